//! Says what this machine and this user can have of paging from user space, tries it, and names the knob for the rest.
//!
//! ```text
//! cargo run --example doctor
//! ```
//!
//! The exit status is 0 if an engine can be built and works.

use std::fmt::Display;
use std::io::{Read, Write};
use std::os::fd::AsRawFd;
use std::process::ExitCode;
use std::sync::mpsc;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use clap::Parser;
use kiomap::{
    AttachOptions, Engine, Error, Features, Ioctls, Kiobuf, MemoryKind, OpenWay, Shutdown, page_size, probe, probe_way,
    range_ioctls,
};
use nix::errno::Errno;
use nix::sys::resource::{RLIM_INFINITY, Resource, getrlimit};
use nix::sys::wait::{WaitStatus, waitpid};
use nix::unistd::{ForkResult, fork};
use serde::Serialize;

/// The features that the engine can't do without. Their absence is the kernel's age, and no knob helps.
const NEEDED: [Features; 4] =
    [Features::EVENT_REMAP, Features::EVENT_UNMAP, Features::MISSING_SHMEM, Features::MINOR_SHMEM];
/// The features that the engine uses where they are there, and what is without them.
const USED: [(Features, &str); 3] = [
    (Features::EVENT_REMOVE, "nothing changes"),
    (Features::THREAD_ID, "lists with a page source are refused"),
    (Features::POISON, "pages that can't be had are masked, which is slower"),
];
/// The self-test's steps, in order: one that is not reported is the one that did not end.
const STEPS: [&str; 8] =
    ["build an engine", "attach", "touch", "SIGBUS past the end", "read by the kernel", "fork", "detach", "shut down"];
/// The self-test takes milliseconds; after this the kernel ends it.
const DEADLINE: Duration = Duration::from_secs(20);
/// Descriptors that the engine holds for each forked process: its socket, its userfaultfd, its pidfd.
const DESCRIPTORS_PER_PROCESS: u64 = 3;
/// Descriptors that a program and its engine have open anyhow, roughly.
const DESCRIPTORS_ANYHOW: u64 = 32;

/// Says what this machine offers for paging from user space, and how to turn on what is missing.
#[derive(Parser)]
#[command(version)]
struct Options {
    /// Print one JSON object instead of text
    #[arg(long)]
    json: bool,
}

#[derive(Serialize)]
struct Report {
    machine: Vec<Fact>,
    ways: Vec<Way>,
    features: Vec<Feature>,
    memory: Vec<Memory>,
    limits: Vec<Fact>,
    self_test: Vec<Step>,
    missing: Vec<Missing>,
    verdict: String,
    works: bool,
}

/// A value, and what it means.
#[derive(Serialize)]
struct Fact {
    name: &'static str,
    value: String,
    note: String,
}

/// A way to open a userfaultfd.
#[derive(Serialize)]
struct Way {
    name: String,
    works: bool,
    serves_kernel_faults: bool,
    note: String,
}

#[derive(Serialize)]
struct Feature {
    name: &'static str,
    since: &'static str,
    offered: bool,
    needed: bool,
    /// What is when the engine has to do without it.
    without: Option<&'static str>,
}

/// What memory of a kind answers to.
#[derive(Serialize)]
struct Memory {
    kind: &'static str,
    ioctls: Vec<&'static str>,
    note: String,
}

#[derive(Serialize)]
struct Step {
    name: String,
    passed: bool,
    note: String,
}

/// Something that is not there, and what turns it on.
#[derive(Serialize)]
struct Missing {
    what: String,
    knob: String,
}

fn main() -> ExitCode {
    let options = Options::parse();
    let outcome = examine().and_then(|report| {
        let text = if options.json { serde_json::to_string_pretty(&report)? + "\n" } else { text(&report) };
        // Not print!, which panics when nobody listens.
        std::io::stdout().lock().write_all(text.as_bytes()).context("writing the report")?;
        Ok(report.works)
    });
    match outcome {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("doctor: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn examine() -> Result<Report> {
    // First, while this process has one thread: it forks.
    let self_test = run_self_test()?;
    let mut missing = Vec::new();
    let machine = machine()?;
    let ways = ways(&mut missing);
    let features = features(&mut missing);
    let memory = memory(&mut missing);
    let limits = limits(&mut missing)?;
    let works = self_test.iter().all(|step| step.passed);
    let kernel_faults = ways.iter().any(|way| way.works && way.serves_kernel_faults);
    let verdict = match self_test.iter().find(|step| !step.passed) {
        Some(step) if step.name == STEPS[0] => format!("an engine can't be built: {}", step.note),
        Some(step) => format!("an engine can be built, but it does not work: {}: {}", step.name, step.note),
        None if kernel_faults => "an engine works here, for every kind of fault".to_owned(),
        None => "an engine works here, but system calls on memory that was not touched yet answer EFAULT".to_owned(),
    };
    Ok(Report { machine, ways, features, memory, limits, self_test, missing, verdict, works })
}

// What there is.

fn machine() -> Result<Vec<Fact>> {
    let uname = nix::sys::utsname::uname().context("uname")?;
    let status = std::fs::read_to_string("/proc/self/status").context("reading /proc/self/status")?;
    let field = |name: &str| {
        let line = status.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
        line.map_or("unknown", str::trim).to_owned()
    };
    let effective = u64::from_str_radix(&field("CapEff"), 16).unwrap_or(0);
    let has = |bit: u32| if effective >> bit & 1 == 1 { "yes" } else { "no" };
    let fact = |name, value: String, note: &str| Fact { name, value, note: note.to_owned() };
    let seccomp = match field("Seccomp").as_str() {
        "0" => "off".to_owned(),
        "1" | "2" => "on".to_owned(),
        _ => "unknown".to_owned(),
    };
    Ok(vec![
        fact(
            "kernel",
            uname.release().to_string_lossy().into_owned(),
            "5.14 is the oldest; 6.6 has all that the engine uses",
        ),
        fact("architecture", uname.machine().to_string_lossy().into_owned(), ""),
        fact("page size", format!("{} bytes", page_size()), ""),
        fact("processors", std::thread::available_parallelism()?.to_string(), ""),
        fact("user", format!("uid {}", nix::unistd::geteuid()), ""),
        fact("CAP_SYS_PTRACE", has(19).to_owned(), "lets userfaultfd(2) serve faults of the kernel"),
        fact("seccomp", seccomp, "a policy may forbid userfaultfd(2)"),
    ])
}

fn ways(missing: &mut Vec<Missing>) -> Vec<Way> {
    let ways = [OpenWay::Device, OpenWay::Syscall, OpenWay::UserModeOnly].map(|way| {
        let (works, note) = match probe_way(way) {
            Ok(_) if way.serves_kernel_faults() => (true, "serves every fault".to_owned()),
            Ok(_) => (true, "system calls on missing pages answer EFAULT".to_owned()),
            Err(failure) => match failure.attempts.first() {
                Some(attempt) => {
                    // Its text names the way, the cause and the remedy.
                    let text = attempt.to_string();
                    let (cause, knob) = text.split_once(" (").unwrap_or((&text, ""));
                    let knob = knob.trim_end_matches(')');
                    missing.push(Missing { what: way.to_string(), knob: knob.to_owned() });
                    (false, cause.trim_start_matches(&format!("{way}: ")).to_owned())
                }
                None => (false, failure.to_string()),
            },
        };
        Way { name: way.to_string(), works, serves_kernel_faults: way.serves_kernel_faults(), note }
    });
    Vec::from(ways)
}

fn features(missing: &mut Vec<Missing>) -> Vec<Feature> {
    // Without any way in, the kernel does not say.
    let Ok(found) = probe() else { return Vec::new() };
    let features = Features::ALL.iter().map(|known| {
        let offered = found.features.contains(known.flag);
        let needed = NEEDED.contains(&known.flag);
        let without = USED.iter().find(|(used, _)| *used == known.flag).map(|(_, without)| *without);
        if !offered {
            let needed = match without {
                _ if needed => ", which the engine needs".to_owned(),
                Some(without) => format!(" ({without})"),
                None => String::new(),
            };
            let knob = format!("boot Linux {} or later", known.since);
            missing.push(Missing { what: format!("{}{needed}", known.name), knob });
        }
        Feature { name: known.name, since: known.since, offered, needed, without }
    });
    features.collect()
}

fn memory(missing: &mut Vec<Missing>) -> Vec<Memory> {
    let kinds = [
        (MemoryKind::Anonymous, "anonymous"),
        (MemoryKind::Memfd, "memfd (the engine's)"),
        (MemoryKind::HugetlbMemfd2M, "memfd of 2 MiB pages"),
    ];
    let kinds = kinds.map(|(kind, name)| match range_ioctls(kind) {
        Ok(ioctls) => Memory { kind: name, ioctls: Ioctls::names(ioctls).collect(), note: String::new() },
        Err(error) => {
            // Without any way in, that is what is missing, and it has been said.
            if !matches!(error, Error::Open(_)) {
                missing.push(Missing { what: name.to_owned(), knob: error.to_string() });
            }
            Memory { kind: name, ioctls: Vec::new(), note: "can't be registered".to_owned() }
        }
    });
    Vec::from(kinds)
}

fn limits(missing: &mut Vec<Missing>) -> Result<Vec<Fact>> {
    let mut limits = Vec::new();
    let mut add = |name, value: String, note: String| limits.push(Fact { name, value, note });

    let (descriptors, hard) = getrlimit(Resource::RLIMIT_NOFILE).context("getrlimit(RLIMIT_NOFILE)")?;
    let processes = descriptors.saturating_sub(DESCRIPTORS_ANYHOW) / DESCRIPTORS_PER_PROCESS;
    let note = format!(
        "about {} forked processes at once",
        shown(if descriptors == RLIM_INFINITY { descriptors } else { processes })
    );
    add("RLIMIT_NOFILE", limit(descriptors, hard, shown), note);
    if processes < 64 {
        let what = format!("descriptors for more than {processes} forked processes");
        missing.push(Missing { what, knob: "raise `ulimit -n`".to_owned() });
    }
    let (soft, hard) = getrlimit(Resource::RLIMIT_MEMLOCK).context("getrlimit(RLIMIT_MEMLOCK)")?;
    add(
        "RLIMIT_MEMLOCK",
        limit(soft, hard, bytes),
        "the length of each region that is to be locked counts, in each process".to_owned(),
    );
    let (soft, hard) = getrlimit(Resource::RLIMIT_NPROC).context("getrlimit(RLIMIT_NPROC)")?;
    let note = "threads of this user; an engine has 7, each forked process 1 more";
    add("RLIMIT_NPROC", limit(soft, hard, shown), note.to_owned());

    let note = "mappings of a process; each piece of a region is one".to_owned();
    add("vm.max_map_count", sysctl("vm/max_map_count"), note);
    let overcommit = sysctl("vm/overcommit_memory");
    if overcommit == "2" {
        let knob = "set the sysctl vm.overcommit_memory=0 (at 2, large page lists of memory may be refused)".to_owned();
        missing.push(Missing { what: "overcommit of memory".to_owned(), knob });
    }
    let note = match overcommit.as_str() {
        "0" => "heuristic: only an obvious excess is refused",
        "1" => "never refused",
        "2" => "strict: large page lists of memory may be refused",
        _ => "",
    };
    add("vm.overcommit_memory", overcommit, note.to_owned());
    let unprivileged = sysctl("vm/unprivileged_userfaultfd");
    let note = match unprivileged.as_str() {
        "0" => "without CAP_SYS_PTRACE, userfaultfd(2) is for user mode only",
        "1" => "userfaultfd(2) serves faults of the kernel for anybody",
        _ => "",
    };
    add("vm.unprivileged_userfaultfd", unprivileged, note.to_owned());
    let open = sysctl("fs/file-nr").split_whitespace().next().unwrap_or("unknown").to_owned();
    let max = sysctl("fs/file-max");
    let max = max.parse().map_or(max.clone(), shown);
    add("fs.file-max", max, format!("open files of the machine; {open} are open"));

    let pool = |file: &str| {
        let path = format!("/sys/kernel/mm/hugepages/hugepages-2048kB/{file}");
        std::fs::read_to_string(path).map_or("unknown".to_owned(), |text| text.trim().to_owned())
    };
    let (total, free) = (pool("nr_hugepages"), pool("free_hugepages"));
    if total == "0" {
        let knob = "set the sysctl vm.nr_hugepages (only vmaps that are built of huge pages use them)".to_owned();
        missing.push(Missing { what: "2 MiB pages in the hugetlb pool".to_owned(), knob });
    }
    add(
        "2 MiB hugetlb pool",
        format!("{total} pages"),
        format!("{free} free; only vmaps that are built of huge pages use them"),
    );
    Ok(limits)
}

/// A sysctl's value, or that it is unknown: an older kernel or a container may not have it.
fn sysctl(path: &str) -> String {
    std::fs::read_to_string(format!("/proc/sys/{path}")).map_or("unknown".to_owned(), |text| text.trim().to_owned())
}

fn limit(soft: u64, hard: u64, show: fn(u64) -> String) -> String {
    if soft == hard { show(soft) } else { format!("{} (hard {})", show(soft), show(hard)) }
}

fn shown(value: u64) -> String {
    // RLIM_INFINITY, and what the kernel writes for no limit of fs.file-max.
    if value >= i64::MAX as u64 { "unlimited".to_owned() } else { value.to_string() }
}

fn bytes(value: u64) -> String {
    match value {
        RLIM_INFINITY => "unlimited".to_owned(),
        _ if value >= 10 << 20 => format!("{} MiB", value >> 20),
        _ => format!("{} KiB", value >> 10),
    }
}

// Whether it works.

/// Runs the self-test in a process of its own: whatever happens there, this one can tell.
fn run_self_test() -> Result<Vec<Step>> {
    let (mut reader, writer) = std::io::pipe().context("a pipe")?;
    // SAFETY: this process has no other thread yet, so the child finds every lock free.
    match unsafe { fork() }.context("fork")? {
        ForkResult::Child => {
            drop(reader);
            // SIGALRM ends a self-test that hangs.
            nix::unistd::alarm::set(DEADLINE.as_secs() as u32);
            let outcome = self_test(&writer);
            if let Err(error) = &outcome {
                let _ = writeln!(&writer, "no\t{}", format!("{error:#}").replace(['\n', '\t'], " "));
            }
            // SAFETY: ends the process at once; what it had open, the kernel closes.
            unsafe { libc::_exit(i32::from(outcome.is_err())) }
        }
        ForkResult::Parent { child } => {
            drop(writer);
            let mut text = String::new();
            reader.read_to_string(&mut text).context("reading what the self-test said")?;
            let status = waitpid(child, None).context("waiting for the self-test")?;
            let mut steps: Vec<Step> = text
                .lines()
                .zip(STEPS)
                .map(|(line, name)| {
                    let (passed, note) = line.split_once('\t').unwrap_or(("no", line));
                    Step { name: name.to_owned(), passed: passed == "yes", note: note.to_owned() }
                })
                .collect();
            if let Some(name) = STEPS.get(steps.len())
                && steps.iter().all(|step| step.passed)
            {
                let note = match status {
                    WaitStatus::Signaled(_, nix::sys::signal::Signal::SIGALRM, _) => {
                        format!("it had not ended after {} s", DEADLINE.as_secs())
                    }
                    WaitStatus::Signaled(_, signal, _) => format!("the process died of {signal}"),
                    _ => format!("the process ended early: {status:?}"),
                };
                steps.push(Step { name: (*name).to_owned(), passed: false, note });
            }
            Ok(steps)
        }
    }
}

/// Does what an application does, and reports each step of [`STEPS`].
fn self_test(mut report: impl Write) -> Result<()> {
    let mut passed = |note: &dyn Display| writeln!(report, "yes\t{note}").context("reporting");
    let page = page_size();

    let engine = Engine::new()?;
    let way = engine.open_way();
    passed(&way)?;

    let mut list = Kiobuf::new();
    list.map_bytes([vec![b'a'; page], vec![b'b'; page], vec![b'c'; page]].concat())?;
    let (gone_sender, gone) = mpsc::channel();
    let vmap = engine.vmap_builder(&list).on_deref(move |_| gone_sender.send(()).unwrap_or(())).build()?;
    let region = vmap.attach(&AttachOptions::new().len_bytes(4 * page))?;
    ensure!(vmap.refcount()? == 1, "the count is {}, not 1", vmap.refcount()?);
    passed(&"a list of 3 pages as a region of 4")?;

    // A fault that brings no neighbours leaves the last page for the kernel to touch first, below.
    let mut byte = [0];
    let frugal = Engine::builder().fault_around_pages(1).build()?;
    let single = frugal.vmap(&list)?.attach(&AttachOptions::new())?;
    for (at, expected) in [(0, b'a'), (page, b'b')] {
        single.read_at(at, &mut byte)?;
        ensure!(byte == [expected], "page {} reads {byte:?}, not {expected}", at / page);
    }
    // A thread that waited for a page may go on before its fault is counted.
    frugal.settle()?;
    ensure!(frugal.stats().faults == 2, "{} faults brought 2 pages", frugal.stats().faults);
    passed(&"2 pages, 2 faults, the right bytes")?;

    // What is SIGBUS for the program itself is EFAULT for a system call, which is easier to survive.
    let (reader, writer) = std::io::pipe()?;
    let tail = region.as_ptr().wrapping_add(3 * page);
    let answer = write_from(&writer, tail);
    ensure!(answer == Err(Errno::EFAULT), "write(2) from past the end of the list answered {answer:?}");
    passed(&"write(2) from there answers EFAULT")?;

    let answer = write_from(&writer, single.as_ptr().wrapping_add(2 * page));
    if way.serves_kernel_faults() {
        ensure!(answer == Ok(1), "write(2) from a page that was not touched yet answered {answer:?}");
        (&reader).read_exact(&mut byte)?;
        ensure!(byte == *b"c", "write(2) from a page that was not touched yet wrote {byte:?}");
        passed(&"write(2) from a page that was not touched yet has the right byte")?;
    } else {
        ensure!(answer == Err(Errno::EFAULT), "write(2) in user mode only answered {answer:?}");
        passed(&"user mode only: write(2) from a page that was not touched yet answers EFAULT")?;
    }

    let counter = region.atomic_u64(0)?;
    counter.store(1, std::sync::atomic::Ordering::SeqCst);
    // SAFETY: the child touches the region, which the engine's fork handlers have made ready for it, and ends.
    match unsafe { fork() }.context("fork")? {
        ForkResult::Child => {
            let seen = region.atomic_u64(0).map(|word| word.fetch_add(1, std::sync::atomic::Ordering::SeqCst));
            let right = matches!(seen, Ok(1)) && matches!(vmap.refcount(), Ok(2));
            // SAFETY: ends the child without running anything of its parent's.
            unsafe { libc::_exit(i32::from(!right)) }
        }
        ForkResult::Parent { child } => {
            let end = waitpid(child, None)?;
            ensure!(matches!(end, WaitStatus::Exited(_, 0)), "the forked process ended as {end:?}");
        }
    }
    let value = counter.load(std::sync::atomic::Ordering::SeqCst);
    ensure!(value == 2, "the forked process's write is not seen: {value}, not 2");
    engine.settle()?;
    ensure!(vmap.refcount()? == 1, "the count after the forked process's exit is {}, not 1", vmap.refcount()?);
    passed(&"a forked process shares the memory, and its end is counted")?;

    drop(region);
    ensure!(vmap.refcount()? == 0, "the count is {}, not 0", vmap.refcount()?);
    if gone.recv_timeout(DEADLINE / 2).is_err() {
        bail!("the deref callback did not fire");
    }
    passed(&"the count is 0, the deref callback fired")?;

    drop(single);
    frugal.shutdown(Shutdown::Poison)?;
    engine.shutdown(Shutdown::Poison)?;
    passed(&"all threads ended")
}

/// Has the kernel read one byte at `from`, and says what it answered.
fn write_from(pipe: &std::io::PipeWriter, from: *const u8) -> std::result::Result<usize, Errno> {
    // SAFETY: the kernel checks the address; it reads one byte there or answers EFAULT.
    let answer = unsafe { libc::write(pipe.as_raw_fd(), from.cast(), 1) };
    Errno::result(answer).map(|count| count as usize)
}

// How it is shown.

fn text(report: &Report) -> String {
    let mut lines = vec!["Machine".to_owned()];
    let facts = |facts: &[Fact], lines: &mut Vec<String>| {
        lines.extend(facts.iter().map(|Fact { name, value, note }| format!("  {name:<28}{value:<24}{note}")));
    };
    facts(&report.machine, &mut lines);

    lines.extend(["", "Ways to open a userfaultfd"].map(str::to_owned));
    let ways = report.ways.iter();
    lines.extend(ways.map(|way| format!("  {:<32}{:<5}{}", way.name, yes(way.works), way.note)));

    lines.extend(["", "Features of the kernel            Linux   here"].map(str::to_owned));
    if report.features.is_empty() {
        lines.push("  unknown: the kernel says so only on a userfaultfd".to_owned());
    }
    let features = report.features.iter();
    lines.extend(features.map(|feature| {
        let use_of_it = match feature.without {
            _ if feature.needed => "the engine needs it".to_owned(),
            Some(without) => format!("the engine uses it; without: {without}"),
            None => String::new(),
        };
        format!("  {:<32}{:<8}{:<5}{use_of_it}", feature.name, feature.since, yes(feature.offered))
    }));

    lines.extend(["", "What memory answers to, registered for missing pages"].map(str::to_owned));
    let memory = report.memory.iter();
    lines.extend(memory.map(|Memory { kind, ioctls, note }| format!("  {kind:<24}{}{note}", ioctls.join(" "))));

    lines.extend(["", "Limits"].map(str::to_owned));
    facts(&report.limits, &mut lines);

    lines.extend(["", "Self-test"].map(str::to_owned));
    let steps = report.self_test.iter();
    lines.extend(
        steps.map(|step| {
            format!("  {:<24}{:<8}{}", step.name, if step.passed { "passed" } else { "FAILED" }, step.note)
        }),
    );

    if !report.missing.is_empty() {
        lines.extend(["", "What is missing, and what turns it on"].map(str::to_owned));
        for Missing { what, knob } in &report.missing {
            lines.push(format!("  {what}"));
            lines.push(format!("      {knob}"));
        }
    }
    lines.extend([String::new(), format!("verdict: {}", report.verdict)]);
    // Columns are padded also where nothing follows.
    lines.iter().map(|line| line.trim_end().to_owned() + "\n").collect()
}

fn yes(value: bool) -> &'static str {
    if value { "yes" } else { "no" }
}
