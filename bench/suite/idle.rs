//! What an engine costs while nothing happens.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use kiomap::Engine;
use nix::sys::wait::waitpid;
use nix::unistd::{ForkResult, fork};

use crate::common::raw::Mapping;
use crate::common::touch::Contents;
use crate::memory::{Place, Served, begin, list, touch_all};
use crate::series::{Bench, Group, Sample, Series};

/// Nanoseconds that the threads of a process have run, all but one.
fn run_ns(pid: i32, but: i32) -> Result<f64> {
    let mut sum = 0.0;
    for task in std::fs::read_dir(format!("/proc/{pid}/task")).context("reading /proc/PID/task")? {
        let task = task.context("reading /proc/PID/task")?;
        if task.file_name().to_str() == Some(but.to_string().as_str()) {
            continue;
        }
        let text = std::fs::read_to_string(task.path().join("schedstat")).context("reading schedstat")?;
        let ns = text.split_whitespace().next().and_then(|ns| ns.parse::<f64>().ok());
        sum += ns.context("a schedstat without a number")?;
    }
    Ok(sum)
}

pub(crate) fn group(bench: &Bench) -> Group {
    let pages = 1024;
    let watch = Duration::from_millis(bench.extent(1000, 200) as u64);
    let per_second = move |ns: f64| Sample { cpu_ns: Some(ns / watch.as_secs_f64()), ..Sample::default() };
    let order: Vec<usize> = (0..pages).collect();
    let all = order.clone();
    let engine = Series::new(
        "idle_engine",
        "processor time in a second of all threads of an engine whose faults are answered",
        1,
        move |bench, _| {
            begin(bench, Place::Free)?;
            let served = Served::new(Engine::builder(), &list(&bench.source, pages)?)?;
            ensure!(touch_all(served.base(), &all, Contents::Marks) == 0, "touches found the wrong bytes");
            served.engine.settle()?;
            let own = nix::unistd::getpid().as_raw();
            // What follows the last fault, such as counting it, is over.
            std::thread::sleep(watch / 10);
            let before = run_ns(own, own)?;
            ensure!(before > 0.0, "the kernel does not say how long threads have run");
            std::thread::sleep(watch);
            Ok(per_second(run_ns(own, own)? - before))
        },
    );
    let child = Series::new(
        "idle_child",
        "the same, with the threads of a forked child that has touched the region",
        1,
        move |bench, _| {
            begin(bench, Place::Free)?;
            let served = Served::new(Engine::builder(), &list(&bench.source, pages)?)?;
            let shared = Mapping::shared(kiomap::page_size())?;
            let (done, finish) = nix::unistd::pipe().context("pipe")?;
            // SAFETY: the child touches memory, makes system calls and ends.
            let child = match unsafe { fork() }.context("fork")? {
                ForkResult::Parent { child } => child,
                ForkResult::Child => {
                    let wrong = touch_all(served.base(), &order, Contents::Marks);
                    drop(finish);
                    // SAFETY: the byte lies in memory that is shared with the parent.
                    unsafe { shared.as_ptr().write_volatile(if wrong == 0 { 1 } else { 2 }) };
                    // Until the parent ends: it keeps the other end open.
                    let _ = nix::unistd::read(&done, &mut [0]);
                    // SAFETY: ends this process at once.
                    unsafe { libc::_exit(0) }
                }
            };
            // SAFETY: as above.
            while unsafe { shared.as_ptr().read_volatile() } == 0 {
                std::thread::yield_now();
            }
            // SAFETY: as above.
            ensure!(unsafe { shared.as_ptr().read_volatile() } == 1, "a child's touches found the wrong bytes");
            served.engine.settle()?;
            std::thread::sleep(watch / 10);
            let own = nix::unistd::getpid().as_raw();
            let count = || Ok::<f64, anyhow::Error>(run_ns(own, own)? + run_ns(child.as_raw(), 0)?);
            let before = count()?;
            std::thread::sleep(watch);
            let ns = count()? - before;
            drop(finish);
            waitpid(child, None).context("waiting for an idle child")?;
            Ok(per_second(ns))
        },
    );
    let repetitions = bench.extent(3, 1);
    Group { name: "idle", title: "Doing nothing", unit: "second", repetitions, series: vec![engine, child] }
}
