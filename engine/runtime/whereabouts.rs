//! On which processor a thread is.

use std::io::Write;

use nix::fcntl::{OFlag, open};
use nix::sys::stat::Mode;
use nix::unistd::read;

/// The field of /proc/PID/stat that is the processor (proc_pid_stat(5)), counted from the one after the name.
const PROCESSOR_AFTER_NAME: usize = 39 - 2;

/// Tells on which processor a thread of this process, or of another, runs or ran last. Allocates nothing.
///
/// `None` if there is no such thread, or its id is of another pid namespace: then it may also be another thread's.
pub(crate) fn of(thread: i32) -> Option<usize> {
    let mut path = [0; 64];
    let mut rest = &mut path[..];
    write!(rest, "/proc/{thread}/stat\0").ok()?;
    let path = std::ffi::CStr::from_bytes_until_nul(&path).ok()?;
    let file = open(path, OFlag::O_RDONLY | OFlag::O_CLOEXEC, Mode::empty()).ok()?;
    let mut text = [0; 1024];
    let len = read(&file, &mut text).ok()?;
    processor(&text[..len])
}

/// Reads the processor out of a line of /proc/PID/stat.
fn processor(stat: &[u8]) -> Option<usize> {
    // The name may contain anything, also spaces and parentheses.
    let after_name = stat.iter().rposition(|&byte| byte == b')')? + 1;
    let field = stat[after_name..].split(|&byte| byte == b' ').nth(PROCESSOR_AFTER_NAME)?;
    std::str::from_utf8(field).ok()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pinned_thread_is_where_it_is_pinned() {
        let me = nix::unistd::Pid::from_raw(0);
        let allowed = nix::sched::sched_getaffinity(me).unwrap();
        for cpu in (0..nix::sched::CpuSet::count()).filter(|&cpu| allowed.is_set(cpu).unwrap()) {
            let mut set = nix::sched::CpuSet::new();
            set.set(cpu).unwrap();
            nix::sched::sched_setaffinity(me, &set).unwrap();
            assert_eq!(of(nix::unistd::gettid().as_raw()), Some(cpu));
        }
        nix::sched::sched_setaffinity(me, &allowed).unwrap();
    }

    #[test]
    fn a_name_with_parentheses_and_spaces_is_passed_over() {
        let fields: Vec<String> = (3..=52).map(|field| field.to_string()).collect();
        let line = format!("1 (a) b (c) {}\n", fields.join(" "));
        assert_eq!(processor(line.as_bytes()), Some(39));
        assert_eq!(processor(b"1 (a) S 1"), None);
        assert_eq!(of(i32::MAX), None);
    }
}
