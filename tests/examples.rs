//! The examples, run as a user runs them: exit status, what they print last, and what they say to bad input.

mod support;

use std::fs::{self, File, Permissions};
use std::io::Read;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use kiomap::page_size;
use serde_json::Value;
use sha2::{Digest, Sha256};
use support::{eventually, limited};

/// Somebody without privileges.
const NOBODY: u32 = 65534;

/// An example, which `cargo test` builds beside the tests.
fn program(name: &str) -> PathBuf {
    let tests = std::env::current_exe().unwrap();
    let path = tests.parent().and_then(Path::parent).unwrap().join("examples").join(name);
    assert!(path.exists(), "{} is not built: run `cargo build --examples` first", path.display());
    path
}

fn run(name: &str, arguments: &[&str]) -> Output {
    limited(&program(name), arguments).output().unwrap()
}

fn stdout(output: &Output) -> String {
    String::from_utf8(output.stdout.clone()).unwrap()
}

fn stderr(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

/// The standard output of a success, which says nothing on the standard error.
#[track_caller]
fn success(output: &Output) -> String {
    assert!(output.status.success(), "{}: {}", output.status, stderr(output));
    assert_eq!(stderr(output), "");
    stdout(output)
}

#[track_caller]
fn last_line(text: &str) -> &str {
    text.lines().last().unwrap()
}

/// A failure: a status of its own, nothing on the standard output, and a message that says this.
#[track_caller]
fn failure(output: &Output, says: &str) {
    assert!(output.status.code().is_some_and(|code| code != 0), "{}", output.status);
    assert_eq!(stdout(output), "");
    assert!(stderr(output).contains(says), "{}", stderr(output));
    assert!(!stderr(output).contains("panicked"), "{}", stderr(output));
}

#[track_caller]
fn json(output: &Output) -> Value {
    serde_json::from_str(&success(output)).unwrap()
}

fn sha256(bytes: &[u8]) -> String {
    Sha256::digest(bytes).iter().map(|byte| format!("{byte:02x}")).collect()
}

/// A file of `len` bytes in which no two pages are equal.
fn file_of(folder: &Path, len: usize) -> (PathBuf, Vec<u8>) {
    let bytes: Vec<u8> = (0..len).map(|at| (at / 256 * 7 + at) as u8).collect();
    let path = folder.join("data");
    fs::write(&path, &bytes).unwrap();
    (path, bytes)
}

#[test]
fn every_example_explains_itself() {
    for (name, option) in [
        ("shared_heap", "--processes"),
        ("page_file", "--fault-around"),
        ("lazy_restore", "--latency-ms"),
        ("doctor", "--json"),
    ] {
        assert!(success(&run(name, &["--help"])).contains(option), "{name}");
        failure(&run(name, &["--no-such-option"]), "--no-such-option");
    }
}

/// T49, T50, T4: the sample driver of the patch, at the borders of what it takes.
#[test]
fn the_shared_heap_verifies_itself_at_every_size() {
    for (pages, processes, rounds) in [(100, 4, 1000), (2, 1, 0), (2, 64, 3), (3, 7, 1), (1000, 5, 20_000)] {
        let [pages_text, processes_text, rounds_text] = [pages, processes, rounds].map(|n: u64| n.to_string());
        let arguments = ["--pages", &pages_text, "--processes", &processes_text, "--rounds", &rounds_text];
        let text = success(&run("shared_heap", &arguments));
        assert!(last_line(&text).starts_with("verified: "), "{text}");

        let found = json(&run("shared_heap", &[&arguments[..], &["--json"]].concat()));
        assert_eq!(found["verified"], true);
        assert_eq!(found["counter"], processes * rounds);
        assert_eq!(found["deref_callbacks"], 1);
        let spaces = found["spaces"].as_array().unwrap();
        // The driver and the trespasser too.
        assert_eq!(spaces.len() as u64, processes + 2);
        assert_eq!(spaces.iter().map(|space| space["pages_installed"].as_u64().unwrap()).sum::<u64>(), pages);
        let counts: Vec<_> =
            found["refcounts"].as_array().unwrap().iter().map(|count| count["refcount"].as_u64()).collect();
        assert_eq!((counts.first(), counts.last()), (Some(&Some(0)), Some(&Some(0))));
        assert_eq!(counts.iter().max(), Some(&Some(processes + 3)));
    }
}

#[test]
fn the_shared_heap_refuses_what_it_can_not_do() {
    for (option, value) in [("--pages", "1"), ("--pages", "1000001"), ("--processes", "0"), ("--processes", "65")] {
        failure(&run("shared_heap", &[option, value]), option);
    }
    failure(&run("shared_heap", &["--rounds=-1"]), "--rounds");
    failure(&run("shared_heap", &["--rounds", "9999999999999999999"]), "64 bits");
}

#[test]
fn a_file_is_paged_in_once_in_any_order_by_any_threads() {
    let folder = tempfile::tempdir().unwrap();
    for len in [1, page_size(), 3 * page_size() + 5, 301 * page_size() - 1] {
        let (path, bytes) = file_of(folder.path(), len);
        let path = path.to_str().unwrap();
        for order in ["random", "sequential"] {
            for (threads, around) in [("1", "1"), ("4", "16"), ("3", "512")] {
                let arguments = [path, "--order", order, "--threads", threads, "--fault-around", around];
                let text = success(&run("page_file", &arguments));
                assert!(last_line(&text).starts_with("verified: "), "{text}");
                assert!(text.contains(&sha256(&bytes)), "{text}");
                let found = json(&run("page_file", &[&arguments[..], &["--json"]].concat()));
                assert_eq!(found["sha256"], sha256(&bytes));
                assert_eq!(found["pages"], len.div_ceil(page_size()));
                assert_eq!(found["pages_installed"], found["pages"]);
            }
        }
    }
}

#[test]
fn what_can_not_be_paged_in_is_refused_with_its_reason() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    File::create(at("empty")).unwrap();
    nix::unistd::mkfifo(&at("fifo"), nix::sys::stat::Mode::S_IRWXU).unwrap();
    for (name, says) in [("empty", "empty"), ("fifo", "neither"), ("absent", "No such file"), (".", "directory")] {
        failure(&run("page_file", &[at(name).to_str().unwrap()]), says);
    }
    let (path, _) = file_of(folder.path(), 10);
    let path = path.to_str().unwrap();
    failure(&run("page_file", &[]), "FILE");
    for (option, value) in [("--threads", "0"), ("--fault-around", "0"), ("--fault-around", "513"), ("--order", "odd")]
    {
        failure(&run("page_file", &[path, option, value]), option);
    }
}

/// T14 of a file: what is gone is SIGBUS, which the program turns into an error message.
#[test]
fn a_file_that_shrinks_meanwhile_is_an_error_not_a_crash() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("shrinking");
    let file = File::create(&path).unwrap();
    // Sparse, and a page at a time: far from being touched through when its mapping appears.
    file.set_len(1 << 30).unwrap();
    let mut command = limited(&program("page_file"), &[path.to_str().unwrap(), "--fault-around", "1"]);
    let mut child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let maps = format!("/proc/{}/maps", child.id());
    eventually("the file is attached", || fs::read_to_string(&maps).unwrap().contains("/memfd:kiomap "));
    file.set_len(0).unwrap();
    let (mut out, mut err) = (String::new(), String::new());
    child.stdout.take().unwrap().read_to_string(&mut out).unwrap();
    child.stderr.take().unwrap().read_to_string(&mut err).unwrap();
    assert_eq!(child.wait().unwrap().code(), Some(1), "{err}");
    assert_eq!(out, "");
    assert!(err.contains("became shorter"), "{err}");
}

#[test]
fn the_doctor_finds_a_working_engine_and_says_so_last() {
    let text = success(&run("doctor", &[]));
    assert!(last_line(&text).starts_with("verdict: an engine works here"), "{text}");
    let found = json(&run("doctor", &["--json"]));
    assert_eq!(found["works"], true);
    assert_eq!(found["ways"].as_array().unwrap().len(), 3);
    assert_eq!(found["features"].as_array().unwrap().len(), 17);
    assert!(found["self_test"].as_array().unwrap().iter().all(|step| step["passed"] == true), "{found}");
}

/// T112: all three for somebody without privileges.
#[test]
fn the_examples_work_without_privileges() {
    if !nix::unistd::geteuid().is_root() {
        skip!("the other tests already run without privileges");
    }
    // Where the programs were built, others may not look.
    let folder = tempfile::tempdir_in("/tmp").unwrap();
    fs::set_permissions(folder.path(), Permissions::from_mode(0o755)).unwrap();
    let (data, bytes) = file_of(folder.path(), 50 * page_size() + 1);
    let secret = folder.path().join("secret");
    fs::write(&secret, "x").unwrap();
    fs::set_permissions(&secret, Permissions::from_mode(0o600)).unwrap();
    let run = |name: &str, arguments: &[&str]| {
        let copy = folder.path().join(name);
        // By another process: a descriptor that writes to a program, inherited by what another test starts at this
        // moment, would keep it from being run (ETXTBSY).
        assert!(Command::new("cp").arg(program(name)).arg(&copy).status().unwrap().success());
        limited(&copy, arguments).uid(NOBODY).gid(NOBODY).current_dir("/").output().unwrap()
    };
    assert!(last_line(&success(&run("shared_heap", &[]))).starts_with("verified: "));
    let found = json(&run("page_file", &[data.to_str().unwrap(), "--json"]));
    assert_eq!(found["sha256"], sha256(&bytes));
    failure(&run("page_file", &[secret.to_str().unwrap()]), "Permission denied");
    let text = success(&run("doctor", &[]));
    assert!(last_line(&text).starts_with("verdict: an engine works here"), "{text}");
    assert!(text.contains("uid 65534"), "{text}");
}

/// A small heap is restored in three ways, each time in a process of its own, with the known answer; what is printed adds up.
#[test]
fn a_heap_is_restored_lazily_and_with_its_working_set() {
    let folder = tempfile::tempdir().unwrap();
    let kept = folder.path().join("heap");
    let kept = kept.to_str().unwrap();
    let small =
        ["--size-mib", "16", "--slab-pages", "8", "--latency-ms", "0.1", "--bandwidth-mb", "0", "--folder", kept];
    let text = success(&run("lazy_restore", &[&small[..], &["--fill"]].concat()));
    assert!(text.contains("simulated: 0.1 ms a read"), "{text}");
    assert!(text.contains("the SHA-256 of all compared"), "{text}");
    assert_eq!(last_line(&text), "verified: each restore gave the known answer");

    // The image and its set are there by now: the same again, past the page cache where the file system can.
    let image = fs::read(folder.path().join("heap/heap.image")).unwrap();
    assert_eq!(image.len(), 16 << 20);
    let found = json(&run("lazy_restore", &[&small[..], &["--json"]].concat()));
    assert_eq!(fs::read(folder.path().join("heap/heap.image")).unwrap(), image);
    let number = |value: &Value| value.as_u64().unwrap();
    let pages = (16 << 20) / page_size() as u64;
    assert_eq!((&found["verified"], number(&found["image"]["pages"])), (&Value::Bool(true), pages));
    let touched = number(&found["touched_pages"]);
    assert!(touched > pages / 40 && touched < pages / 15, "{touched} of {pages}");
    let [eager, cold, replayed] = [0, 1, 2].map(|n| &found["restores"][n]);
    for (restore, how) in [(eager, "eager"), (cold, "cold"), (replayed, "replayed")] {
        assert_eq!(restore["how"], how);
        assert!(restore["first_result_ms"].as_f64().unwrap() > 0.0);
    }
    assert_eq!((number(&eager["bytes_read"]), number(&eager["faults"])), (16 << 20, 0));
    // What is brought lazily is what is touched, with the rest of what is read at once.
    assert!(number(&cold["pages"]) >= touched && number(&cold["pages"]) < pages, "{cold}");
    assert!(number(&cold["bytes_read"]) < 16 << 20);
    assert_eq!(number(&cold["set_pages"]), number(&replayed["set_pages"]));
    assert!(number(&cold["faults"]) >= number(&cold["set_pages"]), "{cold}");
    for ratio in ["cold_to_eager", "replayed_to_cold"] {
        assert!(found[ratio].as_f64().unwrap() > 0.0);
    }
}

/// Any file can be the image; its length needn't be whole pages.
#[test]
fn a_file_is_restored_lazily() {
    let folder = tempfile::tempdir().unwrap();
    let (path, bytes) = file_of(folder.path(), (2 << 20) + 1000);
    let arguments = ["--file", path.to_str().unwrap(), "--slab-pages", "4", "--latency-ms", "0.1", "--fill", "--json"];
    let found = json(&run("lazy_restore", &arguments));
    assert_eq!(found["image"]["bytes"].as_u64(), Some(bytes.len() as u64));
    let touched = found["touched_pages"].as_u64().unwrap();
    assert!((1..=(bytes.len().div_ceil(page_size()) / 20) as u64).contains(&touched), "{touched}");
    assert_eq!(found["restores"][2]["filled"], true);
    failure(&run("lazy_restore", &["--file", "/proc/none"]), "/proc/none");
    failure(&run("lazy_restore", &["--file", folder.path().to_str().unwrap()]), "no file with bytes");
}

/// What can't be restored is said in a line: options out of range, a folder that can't be made, an image that was cut short.
#[test]
fn restores_that_can_not_be_are_told() {
    let folder = tempfile::tempdir().unwrap();
    let kept = folder.path().join("heap");
    let small = |more: &[&str]| {
        let kept = kept.to_str().unwrap();
        let mut arguments = vec!["--size-mib", "4", "--slab-pages", "4", "--latency-ms", "0", "--folder", kept];
        arguments.extend(more);
        run("lazy_restore", &arguments)
    };
    failure(&run("lazy_restore", &["--size-mib", "3"]), "3");
    failure(&run("lazy_restore", &["--working-set", "0.7"]), "below 0.5");
    failure(&run("lazy_restore", &["--slab-pages", "3"]), "a power of two");
    failure(&run("lazy_restore", &["--size-mib", "4", "--slab-pages", "512"]), "smaller --slab-pages");
    failure(&run("lazy_restore", &["--latency-ms=-1"]), "--latency-ms is -1");
    failure(&run("lazy_restore", &["--folder", "/proc/none"]), "/proc/none");
    success(&small(&[]));
    // It is longer than its storage now.
    File::options().write(true).open(kept.join("heap.image")).unwrap().set_len(1 << 20).unwrap();
    failure(&small(&[]), "the image has 256 pages, and the heap 1024");
}
