//! What an engine costs while nobody faults: nothing.

mod support;

use std::collections::BTreeMap;
use std::time::Duration;

use kiomap::{AttachOptions, Shutdown};
use nix::unistd::Pid;
use support::scene::{Told, at, child};
use support::{alone, engine_builder, eventually, mark, pages, reap_ok, touch};

/// How long a handler may look out for more faults after the last one, as documented.
const TAIL: Duration = Duration::from_millis(200);
/// How long nothing may happen.
const QUIET: Duration = Duration::from_secs(1);

/// What the engine's threads of a process have done so far: for each, how often it was switched to and from, and, where
/// the kernel tells, the nanoseconds that it has run.
fn activity(process: Pid) -> BTreeMap<i32, (String, Vec<String>)> {
    let tasks = std::fs::read_dir(format!("/proc/{process}/task")).unwrap().map(Result::unwrap);
    let mut found = BTreeMap::new();
    for task in tasks {
        let read = |what: &str| std::fs::read_to_string(task.path().join(what));
        let name = read("comm").unwrap_or_default().trim().to_owned();
        if !name.starts_with("kiomap-") {
            continue;
        }
        let status = read("status").unwrap();
        let mut done: Vec<String> =
            status.lines().filter(|line| line.contains("ctxt_switches")).map(str::to_owned).collect();
        assert_eq!(done.len(), 2, "{status}");
        // Time on a processor; the time that it waited for one is the second number.
        let schedstat = read("schedstat").unwrap_or_default();
        done.extend(schedstat.split(' ').next().map(str::to_owned));
        found.insert(task.file_name().to_str().unwrap().parse().unwrap(), (name, done));
    }
    assert!(!found.is_empty());
    found
}

/// Fails unless there is a whole second in which no thread of the engine, in any of the processes, was switched to even
/// once. A machine under load may let a thread go to sleep late, so some seconds are tried; one that polls has none.
fn assert_idle(processes: &[Pid]) {
    let all = || processes.iter().map(|&process| activity(process)).collect::<Vec<_>>();
    // The wait is what is measured.
    std::thread::sleep(TAIL);
    let mut seen = Vec::new();
    for _ in 0..5 {
        let before = all();
        std::thread::sleep(QUIET);
        let after = all();
        if before == after {
            return;
        }
        seen.push((before, after));
    }
    panic!("an engine that nobody uses goes on: {seen:#?}");
}

/// After faults of several threads and of a child, with regions attached, no thread of the engine runs: neither the handlers,
/// nor the keeper, nor the guard of the child.
#[test]
fn an_engine_that_nobody_uses_takes_no_processor() {
    alone("an_engine_that_nobody_uses_takes_no_processor", || {
        let engine = engine_builder().fault_around_pages(1).build().unwrap();
        let vmap = engine.vmap(&pages(4000)).unwrap();
        let region = vmap.attach(&AttachOptions::new()).unwrap();
        let touch_some = |first: u64| {
            (first..first + 1000).for_each(|page| assert_eq!(touch::read(at(&region, page)), Ok(mark(page))));
        };
        std::thread::scope(|scope| {
            scope.spawn(|| touch_some(0));
            scope.spawn(|| touch_some(1000));
        });
        let (touched, go_on) = (Told::new(), Told::new());
        let pid = child(|| {
            touch_some(2000);
            touched.tell(1);
            go_on.wait();
        });
        touched.wait();
        touch_some(3000);
        engine.settle().unwrap();
        assert_idle(&[Pid::this(), pid]);
        go_on.tell(1);
        reap_ok(pid);
        drop(region);
        engine.settle().unwrap();
        assert_idle(&[Pid::this()]);
    });
}

/// The guard that an engine leaves behind takes no processor either.
#[test]
fn a_guard_that_nobody_needs_takes_no_processor() {
    alone("a_guard_that_nobody_needs_takes_no_processor", || {
        let engine = engine_builder().fault_around_pages(1).build().unwrap();
        let vmap = engine.vmap(&pages(100)).unwrap();
        let region = vmap.attach(&AttachOptions::new()).unwrap();
        (0..50).for_each(|page| assert_eq!(touch::read(at(&region, page)), Ok(mark(page))));
        engine.shutdown(Shutdown::Poison).unwrap();
        support::assert_sigbus(&region, 70);
        assert_idle(&[Pid::this()]);
        drop(region);
        drop(vmap);
        drop(engine);
        eventually("its threads end", || support::threads().iter().all(|name| !name.starts_with("kiomap-")));
    });
}
