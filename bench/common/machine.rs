//! The machine: what it is, how it is set, and whether it is at rest.

use std::time::{Duration, Instant};

use kiomap::OpenWay;
use serde::{Deserialize, Serialize};

/// What the numbers were measured on.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Machine {
    pub(crate) cpu: String,
    pub(crate) cpus: usize,
    pub(crate) virtual_machine: bool,
    pub(crate) memory_mib: u64,
    pub(crate) kernel: String,
    /// Settings that matter, as the kernel shows them.
    pub(crate) settings: Vec<(String, String)>,
}

impl Machine {
    pub(crate) fn look() -> Machine {
        let cpuinfo = read("/proc/cpuinfo").unwrap_or_default();
        let field = |name: &str| {
            let line = cpuinfo.lines().find(|line| line.starts_with(name))?;
            Some(line.split_once(':')?.1.trim().to_owned())
        };
        let kernel = nix::sys::utsname::uname().map_or_else(
            |_| "an unknown kernel".to_owned(),
            |name| format!("Linux {} {}", name.release().to_string_lossy(), name.machine().to_string_lossy()),
        );
        let settings = [
            ("transparent huge pages", "/sys/kernel/mm/transparent_hugepage/enabled"),
            ("transparent huge pages in shared memory", "/sys/kernel/mm/transparent_hugepage/shmem_enabled"),
            ("hugetlb pages", "/proc/sys/vm/nr_hugepages"),
            ("idle driver", "/sys/devices/system/cpu/cpuidle/current_driver"),
            ("idle governor", "/sys/devices/system/cpu/cpuidle/current_governor"),
            ("unprivileged userfaultfd", "/proc/sys/vm/unprivileged_userfaultfd"),
        ];
        Machine {
            cpu: field("model name").unwrap_or_else(|| std::env::consts::ARCH.to_owned()),
            cpus: cpuinfo.lines().filter(|line| line.starts_with("processor")).count(),
            virtual_machine: field("flags").is_some_and(|flags| flags.split(' ').any(|flag| flag == "hypervisor")),
            memory_mib: meminfo("MemTotal:") / 1024,
            kernel,
            settings: settings
                .map(|(name, path)| (name.to_owned(), read(path).unwrap_or_else(|| "not there".to_owned())))
                .into(),
        }
    }

    /// Processor, number of processors, kernel.
    pub(crate) fn line(&self) -> String {
        let place = if self.virtual_machine { ", in a virtual machine" } else { "" };
        format!("{}, {} processors{place}; {}", self.cpu, self.cpus, self.kernel)
    }
}

/// A value of `/proc/meminfo`, in KiB; 0 if it is not there.
pub(crate) fn meminfo(name: &str) -> u64 {
    let meminfo = read("/proc/meminfo").unwrap_or_default();
    let value = meminfo.lines().find_map(|line| line.strip_prefix(name));
    value.and_then(|text| text.trim().trim_end_matches(" kB").parse().ok()).unwrap_or(0)
}

fn read(path: &str) -> Option<String> {
    let text = std::fs::read_to_string(path).ok()?.trim().to_owned();
    // Of a list of choices, the kernel puts the one that holds into brackets.
    let chosen = text.split_once('[').and_then(|(_, rest)| Some(rest.split_once(']')?.0.to_owned()));
    Some(chosen.filter(|_| !text.contains('\n')).unwrap_or(text)).filter(|text| !text.is_empty())
}

pub(crate) fn open_way_name(way: OpenWay) -> &'static str {
    match way {
        OpenWay::Device => "/dev/userfaultfd",
        OpenWay::Syscall => "userfaultfd(2)",
        OpenWay::UserModeOnly => "userfaultfd(2), user mode only",
    }
}

/// What all processors have worked since the machine started, if the kernel says so.
pub(crate) fn busy_seconds() -> Option<f64> {
    let stat = std::fs::read_to_string("/proc/stat").ok()?;
    let ticks: Vec<f64> = stat.lines().next()?.split_whitespace().skip(1).filter_map(|n| n.parse().ok()).collect();
    let per_second = nix::unistd::sysconf(nix::unistd::SysconfVar::CLK_TCK).ok()??;
    // user, nice, system; then come idle and iowait; then irq and softirq.
    Some((ticks.get(..3)?.iter().sum::<f64>() + ticks.get(5..7)?.iter().sum::<f64>()) / per_second as f64)
}

/// Waits, for a while, until the processors are at rest; tells whether they are.
pub(crate) fn wait_for_rest(patience: Duration) -> bool {
    const LOOK: Duration = Duration::from_millis(100);
    let begin = Instant::now();
    loop {
        let (Some(before), ()) = (busy_seconds(), std::thread::sleep(LOOK)) else { return false };
        let busy = busy_seconds().map_or(f64::INFINITY, |after| after - before);
        // Two ticks of a clock that has a hundred a second: others leave more than four fifths of one processor.
        if busy < 0.025 {
            return true;
        }
        if begin.elapsed() > patience {
            return false;
        }
    }
}
