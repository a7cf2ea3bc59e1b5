//! The tool that makes images, run as a user runs it: what it makes, and what it leaves behind when it can't.
#![cfg(feature = "zstd")]

mod support;

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use serde_json::Value;
use sha2::{Digest, Sha256};
use support::contents::contents;
use support::limited;

/// The example, which `cargo test` builds beside the tests, or `cargo build --example image`.
fn program() -> PathBuf {
    let tests = std::env::current_exe().unwrap();
    let path = tests.parent().and_then(Path::parent).unwrap().join("examples/image");
    assert!(path.exists(), "{} is not built: run `cargo build --all-features --example image` first", path.display());
    path
}

fn run(program: &Path, arguments: &[&str]) -> Output {
    limited(program, arguments).output().unwrap()
}

#[track_caller]
fn success(arguments: &[&str]) -> String {
    let output = run(&program(), arguments);
    let told = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.success() && told.is_empty(), "{arguments:?}: {}: {told}", output.status);
    String::from_utf8(output.stdout).unwrap()
}

/// A failure that says why in one line, and nothing else.
#[track_caller]
fn failure(arguments: &[&str], why: &str) {
    let output = run(&program(), arguments);
    let told = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(1), "{arguments:?}: {told}");
    assert!(told.contains(why), "{arguments:?}: {told}");
    assert_eq!((told.lines().count(), output.stdout.len()), (1, 0), "{arguments:?}: {told}");
}

fn names(folder: &Path) -> Vec<String> {
    let mut names: Vec<_> =
        fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

fn sha256(bytes: &[u8]) -> String {
    Sha256::digest(bytes).iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Images of both kinds hold the file, say so, and know its zeros; the plain one is the file itself, with holes.
#[test]
fn images_of_both_kinds_hold_the_file() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name).to_str().unwrap().to_owned();
    let mut bytes: Vec<u8> = contents(3_000_000, 51).iter().map(|byte| byte | 1).collect();
    bytes[500_000..1_500_000].fill(0);
    fs::write(path("file"), &bytes).unwrap();
    let (file, zstd, plain) = (&path("file"), &path("zstd"), &path("plain"));
    for (image, options) in [(zstd, &["--level", "5", "--frame", "64K"][..]), (plain, &["--format", "plain"][..])] {
        let text = success(&[&["make", file, image], options].concat());
        assert!(text.contains(&sha256(&bytes)), "{text}");
        let text = success(&["check", image, "--against", file]);
        assert!(text.lines().last().unwrap().starts_with("verified: "), "{text}");
        let found: Value = serde_json::from_str(&success(&["info", image, "--json"])).unwrap();
        assert_eq!((&found["bytes"], &found["pages"]), (&bytes.len().into(), &733.into()));
        // Of a million zeros, those in whole frames or blocks of 64 KiB; a file system may know no holes.
        let zero_pages = found["zero_pages"].as_u64().unwrap();
        assert!(zero_pages == 224 || (image == plain && zero_pages == 0), "{found}");
        // As any other file is made.
        assert_eq!(fs::metadata(image).unwrap().mode() & 0o777, fs::metadata(file).unwrap().mode() & 0o777);
        assert!(success(&["info", image]).contains("3000000 bytes"));
    }
    let found: Value = serde_json::from_str(&success(&["info", zstd, "--json"])).unwrap();
    assert_eq!((&found["frames"], &found["granule_bytes"]), (&46.into(), &65_536.into()));
    assert_eq!(found["sha256"], sha256(&bytes));
    assert!(success(&["check", zstd]).starts_with("verified: "));
    assert!(fs::read(plain).unwrap() == bytes);
    assert!(fs::metadata(zstd).unwrap().len() < bytes.len() as u64);
    assert_eq!(names(folder.path()), ["file", "plain", "zstd"]);
}

/// The tool explains itself, and what it does not understand is told.
#[test]
fn the_tool_explains_itself() {
    for (command, option) in
        [(&["--help"][..], "check"), (&["make", "--help"], "--frame"), (&["info", "--help"], "--json")]
    {
        assert!(success(command).contains(option), "{command:?}");
    }
    for wrong in [
        &["unmake"][..],
        &["make", "one"],
        &["make", "a", "b", "--frame", "12X"],
        &["make", "a", "b", "--format", "zip"],
    ] {
        let output = run(&program(), wrong);
        assert_eq!(output.status.code(), Some(2), "{wrong:?}");
        assert!(!output.stderr.is_empty(), "{wrong:?}");
    }
}

/// What can't be made into an image, or not there, is told in a line; nothing is left, and nothing is overwritten.
#[test]
fn what_cant_be_made_leaves_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name).to_str().unwrap().to_owned();
    fs::write(path("file"), [7; 10_000]).unwrap();
    fs::write(path("there"), "dear").unwrap();
    fs::write(path("empty"), []).unwrap();
    nix::unistd::mkfifo(path("fifo").as_str(), nix::sys::stat::Mode::S_IRWXU).unwrap();
    let image = &path("image");
    failure(&["make", &path("file"), &path("there")], "is there already");
    failure(&["make", &path("none"), image], "No such file");
    failure(&["make", &path("empty"), image], "is empty");
    failure(&["make", &path("fifo"), image], "neither a regular file nor a block device");
    failure(&["make", folder.path().to_str().unwrap(), image], "is a directory");
    failure(&["make", &path("file"), &path("no/such/image")], "No such file");
    failure(&["make", &path("file"), image, "--frame", "5000"], "power of two");
    assert_eq!(run(&program(), &["make", &path("file"), image, "--level", "23"]).status.code(), Some(2));
    assert_eq!(run(&program(), &["make", &path("file"), image, "--frame", "1G"]).status.code(), Some(2));
    assert_eq!(names(folder.path()), ["empty", "fifo", "file", "there"]);
    assert_eq!(fs::read_to_string(path("there")).unwrap(), "dear");
}

/// A disk that becomes full: told in a line, and no image is left, nor a part of one.
#[test]
fn a_full_disk_leaves_no_image() {
    let folder = tempfile::tempdir().unwrap();
    fs::write(folder.path().join("file"), contents(2_000_000, 52).iter().map(|byte| byte | 1).collect::<Vec<_>>())
        .unwrap();
    fs::create_dir(folder.path().join("small")).unwrap();
    for format in ["zstd", "plain"] {
        // A file system of its own, which ends with the process.
        let script = "mount -t tmpfs -o size=128k none small || exit 77
            \"$0\" make file small/image --format \"$1\"; status=$?; ls -A small; exit $status";
        let output = Command::new("unshare")
            .args(["--user", "--map-root-user", "--mount", "sh", "-c", script])
            .arg(program())
            .arg(format)
            .current_dir(folder.path())
            .output();
        let output = match output {
            Ok(output)
                if output.status.code() == Some(1) && String::from_utf8_lossy(&output.stderr).contains("image:") =>
            {
                output
            }
            other => skip!("no file system of its own can be made here: {other:?}"),
        };
        let told = String::from_utf8_lossy(&output.stderr);
        assert!(told.contains("No space left on device"), "{told}");
        assert_eq!(String::from_utf8_lossy(&output.stdout), "", "something is left");
    }
}

/// A damaged image, one that was cut off, and one that holds another file are told.
#[test]
fn a_check_finds_what_is_wrong() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name).to_str().unwrap().to_owned();
    let bytes = contents(1_000_000, 53);
    fs::write(path("file"), &bytes).unwrap();
    let image = &path("image");
    success(&["make", &path("file"), image]);
    let whole = fs::read(image).unwrap();
    let mut bent = whole.clone();
    bent[whole.len() / 2] ^= 0x10;
    fs::write(path("bent"), bent).unwrap();
    failure(&["check", &path("bent")], "damaged");
    for len in [whole.len() - 1, whole.len() / 2, 100] {
        fs::write(path("cut"), &whole[..len]).unwrap();
        failure(&["check", &path("cut")], "seek table");
        failure(&["info", &path("cut")], "seek table");
    }
    let mut other = bytes.clone();
    other[654_321] ^= 1;
    fs::write(path("other"), &other).unwrap();
    failure(&["check", image, "--against", &path("other")], "byte 654321 of the image");
    fs::write(path("other"), &bytes[1..]).unwrap();
    failure(&["check", image, "--against", &path("other")], "the image holds 1000000 bytes");
    fs::write(path("plain"), "bytes").unwrap();
    failure(&["check", &path("plain")], "--against FILE");
}

/// A plain image of a file that begins as a zstd image is one if it is said to be; a zstd image may begin with a frame that is skipped.
#[test]
fn the_kind_of_an_image_can_be_said() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name).to_str().unwrap().to_owned();
    let (file, plain, image) = (&path("file"), &path("plain"), &path("image"));
    let bytes = [&0xfd2f_b528_u32.to_le_bytes()[..], &contents(100_000, 54)].concat();
    fs::write(file, &bytes).unwrap();
    success(&["make", file, plain, "--format", "plain"]);
    failure(&["info", plain], "--format plain");
    failure(&["check", plain, "--against", file], "--format plain");
    assert!(success(&["info", plain, "--format", "plain"]).contains(", plain, 100004 bytes"));
    assert!(success(&["check", plain, "--against", file, "--format", "plain"]).starts_with("verified: "));
    failure(&["info", file, "--format", "zstd"], "seek table");

    // By another tool: a skipped frame, then what the table lists.
    let mut skipped = 0x184d_2a50_u32.to_le_bytes().to_vec();
    skipped.extend([4, 0, 0, 0, 1, 2, 3, 4]);
    let mut packed = Vec::with_capacity(zstd_safe::compress_bound(5000));
    zstd_safe::compress(&mut packed, &[7; 5000], 1).unwrap();
    let entries = [skipped.len() as u32, 0, packed.len() as u32, 5000].map(u32::to_le_bytes).concat();
    let table =
        [&0x184D_2A5E_u32.to_le_bytes()[..], &25_u32.to_le_bytes(), &entries, &2_u32.to_le_bytes(), &[0]].concat();
    fs::write(image, [&skipped[..], &packed, &table, &0x8F92_EAB1_u32.to_le_bytes()].concat()).unwrap();
    assert!(success(&["info", image]).contains(", zstd, "));
    assert!(success(&["check", image]).starts_with("verified: "));
    assert!(success(&["info", image, "--format", "plain"]).contains(", plain, "));
}
