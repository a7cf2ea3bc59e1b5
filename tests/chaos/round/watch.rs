//! Rounds that hang: where, and what every thread waits for.

use super::*;

/// Says where a round hangs, and what every thread of it waits for.
pub(super) fn watch(now: &Arc<Mutex<(Instant, String)>>, patience: Duration) {
    let now = Arc::clone(now);
    let (started, wait) = std::sync::mpsc::channel();
    let body = move || {
        // It has its name by now.
        let _ = started.send(());
        loop {
            std::thread::sleep(Duration::from_millis(100));
            let (since, what) = now.lock().unwrap().clone();
            if since.elapsed() > patience {
                crate::support::tell(&format!("chaos: found: {what}: hangs\n{}", who_waits()));
                // SAFETY: ends the process without exit handlers.
                unsafe { libc::_exit(102) };
            }
        }
    };
    std::thread::Builder::new().name("watch".into()).spawn(body).unwrap();
    wait.recv().unwrap();
}

/// The threads of this process group: what the kernel says of each.
fn who_waits() -> String {
    let group = nix::unistd::getpgrp().as_raw().to_string();
    let mut text = String::new();
    for entry in std::fs::read_dir("/proc").into_iter().flatten().flatten() {
        let read = |path: std::path::PathBuf| std::fs::read_to_string(path).unwrap_or_default().trim().to_owned();
        let stat = read(entry.path().join("stat"));
        let fields: Vec<&str> = stat.rsplit(')').next().unwrap_or_default().split_whitespace().collect();
        if fields.get(2) != Some(&group.as_str()) {
            continue;
        }
        for task in std::fs::read_dir(entry.path().join("task")).into_iter().flatten().flatten() {
            let path = task.path();
            let (comm, wchan) = (read(path.join("comm")), read(path.join("wchan")));
            let (syscall, stack) = (read(path.join("syscall")), read(path.join("stack")));
            text.push_str(&format!("{} {comm}: {wchan}; syscall {syscall}\n", path.display()));
            for line in stack.lines().take(8) {
                text.push_str(&format!("    {line}\n"));
            }
        }
    }
    text
}
