//! Objects in stores: right bytes or SIGBUS within the deadline, whatever the store does.
//!
//! The tests against a server that speaks S3 need one: `.ci/object-store` starts it and says where it is by `KIOMAP_S3_ENDPOINT`.
#![cfg(feature = "object-store")]

mod support;

use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::net::{SocketAddr, TcpListener};
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use base64::Engine as _;
use base64::prelude::BASE64_STANDARD;
use kiomap::object_store::aws::AmazonS3Builder;
use kiomap::object_store::memory::InMemory;
use kiomap::object_store::path::Path;
use kiomap::object_store::{ObjectStore, ObjectStoreExt};
use kiomap::{Error, Kiobuf, ObjectOptions, ObjectSource, PageSource, SourceFault, page_size};
use nix::errno::Errno;
use support::contents::{assert_holds, contents, right_or_sigbus};
use support::web::{Manners, NOTHING, STRONG, TIMES, WEAK, Web};
use support::{
    DEADLINE, alone, attached, engine_builder, eventually, fork_child, mark, reap_ok, settled_stats, threads,
};
use tokio::runtime::Runtime;

fn list_of(source: impl PageSource) -> Kiobuf {
    let (mut list, len) = (Kiobuf::new(), source.len_bytes().unwrap());
    list.map_source(Arc::new(source), len).unwrap();
    list
}

fn fault(error: &Error) -> SourceFault {
    match error {
        Error::Source { fault, .. } => *fault,
        other => panic!("{other}"),
    }
}

fn refusal(url: &str, options: &ObjectOptions) -> Error {
    ObjectSource::open(url, options).map(drop).unwrap_err()
}

/// A store in memory with one object, and the runtime that put it there.
fn in_memory(bytes: &[u8]) -> (Arc<InMemory>, Path, Runtime) {
    let (store, path, runtime) = (Arc::new(InMemory::new()), Path::from("a/b"), Runtime::new().unwrap());
    runtime.block_on(store.put(&path, bytes.to_vec().into())).unwrap();
    (store, path, runtime)
}

/// An object in a folder pages in; one that is replaced is SIGBUS for what is not there yet, and never mixed.
#[test]
fn an_object_in_a_folder_pages_in_until_it_is_replaced() {
    needs_sources!();
    alone("an_object_in_a_folder_pages_in_until_it_is_replaced", || {
        let folder = tempfile::tempdir().unwrap();
        let (path, bytes) = (folder.path().join("an object"), contents(90 * page_size() + 5, 31));
        fs::write(&path, &bytes).unwrap();
        let url = format!("file://{}/an%20object", folder.path().display());
        let options = ObjectOptions::new().granule_bytes(1 << 16);
        let engine = engine_builder().fault_around_pages(1).build().unwrap();
        let (_vmap, region) = attached(&engine, &list_of(ObjectSource::open(&url, &options).unwrap()));
        assert_holds(&region, &bytes);

        let source = ObjectSource::open(&url, &options).unwrap();
        let identity = source.identity().unwrap();
        let engine = engine_builder().fault_around_pages(1).build().unwrap();
        let (_vmap, region) = attached(&engine, &list_of(source));
        assert!(support::read_page(&region, 70).is_ok());
        let other = folder.path().join("other");
        fs::write(&other, contents(bytes.len(), 32)).unwrap();
        fs::rename(&other, &path).unwrap();
        let (right, refused) = right_or_sigbus(&region, &bytes);
        assert!(right >= 1 && refused >= 91 - 16 && right + refused == 91, "{right} right, {refused} refused");
        assert_ne!(ObjectSource::open(&url, &options).unwrap().identity().unwrap(), identity);
    });
}

/// A store of the caller's own, on a runtime of the caller's, opened and read within another runtime and outside of any.
#[test]
fn a_store_and_a_runtime_of_ones_own_will_do() {
    needs_sources!();
    alone("a_store_and_a_runtime_of_ones_own_will_do", || {
        let bytes = contents(40 * page_size(), 33);
        let (store, path, runtime) = in_memory(&bytes);
        let options = ObjectOptions::new().runtime(runtime.handle().clone());
        // Within a runtime nothing may block by the runtime's own means.
        let another = Runtime::new().unwrap();
        let source = another.block_on(async {
            let source = ObjectSource::open_in(Arc::clone(&store) as _, &path, &options).unwrap();
            let mut page = vec![0; page_size()];
            source.read_at(0, &mut page).unwrap();
            assert!(page == bytes[..page_size()]);
            // One with a runtime of its own may end here.
            drop(ObjectSource::open_in(Arc::clone(&store) as _, &path, &ObjectOptions::new()).unwrap());
            source
        });
        eventually("the end of that one", || threads().iter().all(|name| name != "kiomap-objects"));
        let engine = engine_builder().build().unwrap();
        let (_vmap, region) = attached(&engine, &list_of(source));
        std::thread::scope(|scope| (0..4).for_each(|_| drop(scope.spawn(|| assert_holds(&region, &bytes)))));

        // A thread of the runtime that is to do the work would wait for itself.
        let (asked, given) = ((Arc::clone(&store), path.clone()), options.clone());
        let refused = runtime.block_on(runtime.spawn(async move {
            let began = Instant::now();
            let refused = ObjectSource::open_in(asked.0, &asked.1, &given).map(drop).unwrap_err();
            (refused, began.elapsed())
        }));
        let (refused, took) = refused.unwrap();
        assert!(matches!(refused, Error::Invalid { .. }) && refused.to_string().contains("outside"), "{refused}");
        assert!(took < Duration::from_secs(5), "{took:?}");

        let single = tokio::runtime::Builder::new_current_thread().build().unwrap();
        let options = ObjectOptions::new().runtime(single.handle().clone());
        let refused = ObjectSource::open_in(Arc::clone(&store) as _, &path, &options).map(drop).unwrap_err();
        assert_eq!(refused.errno(), Errno::EINVAL, "{refused}");

        // A runtime that has ended answers no more: an error at once, and no wait.
        let ended = Runtime::new().unwrap();
        let options = ObjectOptions::new().runtime(ended.handle().clone());
        let source = ObjectSource::open_in(store, &path, &options).unwrap();
        drop(ended);
        let began = Instant::now();
        assert!(source.read_at(0, &mut vec![0; page_size()]).is_err());
        assert!(began.elapsed() < Duration::from_secs(10));
    });
}

/// A forked process is served by the engine's; it may let go of what it inherited, and asks no store by itself.
#[test]
fn a_forked_process_has_the_object_s_pages() {
    needs_sources!();
    alone("a_forked_process_has_the_object_s_pages", || {
        let mut bytes = vec![0; 30 * page_size()];
        support::fill_marks(0, &mut bytes);
        let (store, path, runtime) = in_memory(&bytes);
        let source = Arc::new(ObjectSource::open_in(store, &path, &ObjectOptions::new()).unwrap());
        let mut list = Kiobuf::new();
        list.map_source(Arc::clone(&source) as _, bytes.len() as u64).unwrap();
        let engine = engine_builder().build().unwrap();
        let (_vmap, region) = attached(&engine, &list);
        drop((runtime, list));
        let child = fork_child(|| {
            (0..30).for_each(|n| assert_eq!(support::read_page(&region, n), Ok(mark(n))));
            assert!(source.read_at(0, &mut [0; 10]).is_err());
            drop(source);
        });
        reap_ok(child);
    });
}

/// What a server does, and whether its pages are right then.
fn behaviours() -> Vec<(Vec<Manners>, bool)> {
    use Manners::*;
    let once = |bad: Manners| vec![bad, Honest];
    vec![
        (vec![Honest], true),
        // The library tries again.
        (once(Status(503)), true),
        (vec![Status(500), Status(502), Honest], true),
        (once(CloseWithin), true),
        (vec![CloseWithin, CloseWithin, CloseWithin, Honest], true),
        (vec![Status(503)], false),
        (vec![Status(404)], false),
        (vec![Status(403)], false),
        (vec![Status(412)], false),
        (vec![Status(416)], false),
        (vec![CloseWithin], false),
        (vec![Stall], false),
        (vec![StallWithin], false),
        (vec![Garbage], false),
        (vec![OtherRange], false),
        (vec![Short], false),
        (vec![Long], false),
        (vec![Whole], false),
        (vec![Other], false),
        (vec![Nameless], false),
        (vec![OtherSize], false),
        // Half of one object is never followed by half of another.
        (vec![CloseWithin, Other], false),
        (vec![CloseWithin, OtherRange], false),
    ]
}

/// A server that answers 5xx, stalls, closes in the middle, or lies about lengths, ranges and names: the touch has the right
/// bytes or is SIGBUS, within the deadline.
#[test]
fn a_bad_server_gives_right_bytes_or_sigbus_in_time() {
    needs_sources!();
    alone("a_bad_server_gives_right_bytes_or_sigbus_in_time", || {
        let bytes = contents(64 * page_size(), 34);
        let behaviours = behaviours();
        // Each waits for its own deadlines.
        std::thread::scope(|scope| {
            for (manners, right) in &behaviours {
                let bytes = &bytes;
                scope.spawn(move || {
                    let web = Web::serve(bytes.clone());
                    // Time for what is tried again, or no more than it takes.
                    let deadline = Duration::from_millis(if *right { 20_000 } else { 700 });
                    // Each page by a request of its own, whatever an engine reads at once.
                    let options = ObjectOptions::new().granule_bytes(page_size());
                    let source = ObjectSource::open(&web.url(), &options.deadline(deadline)).unwrap();
                    let engine = engine_builder().fault_around_pages(1).build().unwrap();
                    let (_vmap, region) = attached(&engine, &list_of(source));
                    for page in [3, 40, 63] {
                        web.behave(manners);
                        let (began, gets) = (Instant::now(), web.gets.load(Ordering::SeqCst));
                        let touched = support::read_page(&region, page);
                        assert_eq!(touched.is_ok(), *right, "{manners:?}: {touched:?}");
                        let mut held = vec![0; page_size()];
                        if *right {
                            region.read_at(page as usize * page_size(), &mut held).unwrap();
                            assert!(held == bytes[page as usize * page_size()..][..page_size()], "{manners:?}");
                        } else {
                            support::assert_sigbus(&region, page);
                        }
                        assert!(web.gets.load(Ordering::SeqCst) - gets >= manners.len() as u64 - 1, "{manners:?}");
                        assert!(began.elapsed() < DEADLINE / 2, "{manners:?} took {:?}", began.elapsed());
                    }
                });
            }
        });
    });
}

/// However a server tells one object from another, one that takes the place of the first is SIGBUS; one that tells nothing is
/// refused.
#[test]
fn an_object_is_told_from_another_by_whatever_there_is() {
    needs_sources!();
    alone("an_object_is_told_from_another_by_whatever_there_is", || {
        let (bytes, options) = (contents(48 * page_size(), 41), ObjectOptions::new().deadline(Duration::from_secs(20)));
        let mut identities = Vec::new();
        for names in [STRONG, WEAK, TIMES] {
            let web = Web::serve_told_by(names, bytes.clone());
            let source = ObjectSource::open(&web.url(), &options.clone().granule_bytes(page_size())).unwrap();
            identities.push(source.identity().unwrap());
            let engine = engine_builder().fault_around_pages(1).build().unwrap();
            let (_vmap, region) = attached(&engine, &list_of(source));
            for page in 0..10 {
                assert!(support::read_page(&region, page).is_ok(), "{names:?}");
            }
            web.behave(&[Manners::Other]);
            assert_eq!(right_or_sigbus(&region, &bytes), (10, 38), "{names:?}");
        }
        identities.dedup();
        assert_eq!(identities.len(), 3, "{identities:?}");
        let web = Web::serve_told_by(NOTHING, bytes);
        assert_eq!(fault(&refusal(&web.url(), &options)), SourceFault::Unsupported);
    });
}

/// A region of which a part can't be had is served again when the server is: pages that were not refused, to whoever touches them.
#[test]
fn a_server_that_recovers_serves_the_rest() {
    needs_sources!();
    alone("a_server_that_recovers_serves_the_rest", || {
        let bytes = contents(64 * page_size(), 35);
        let web = Web::serve(bytes.clone());
        let options = ObjectOptions::new().deadline(Duration::from_millis(500)).granule_bytes(page_size());
        let engine = engine_builder().fault_around_pages(1).build().unwrap();
        let (_vmap, region) = attached(&engine, &list_of(ObjectSource::open(&web.url(), &options).unwrap()));
        web.behave(&[Manners::Stall]);
        support::assert_sigbus(&region, 9);
        web.behave(&[Manners::Honest]);
        assert_eq!(right_or_sigbus(&region, &bytes), (63, 1));
        assert!(settled_stats(&engine).source_errors >= 1);
    });
}

/// What can be known when an object is opened is told then, by name, within the deadline.
#[test]
fn what_cant_be_opened_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    fs::write(folder.path().join("empty"), []).unwrap();
    let file = |name: &str| format!("file://{}/{name}", folder.path().display());
    // Nobody listens there.
    let closed = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    // Somebody does, and never says a word.
    let silent = TcpListener::bind("127.0.0.1:0").unwrap();
    let options = ObjectOptions::new().deadline(Duration::from_secs(2));
    let s3 = options.clone().set("aws_region", "us-east-1");
    let io = SourceFault::Io(Errno::EIO);
    let cases = [
        (refusal("no url", &options), vec![SourceFault::NotThatFormat]),
        (refusal("gopher://host/path", &options), vec![SourceFault::NotThatFormat]),
        (refusal(&file("none"), &options), vec![SourceFault::NotFound]),
        (refusal(&file("empty"), &options), vec![SourceFault::Empty]),
        (refusal(&format!("http://{closed}/object"), &options), vec![io, SourceFault::TimedOut]),
        (refusal(&format!("http://{}/object", silent.local_addr().unwrap()), &options), vec![SourceFault::TimedOut]),
        (refusal("s3://bucket/key", &s3.clone().set("no_such_setting", "1")), vec![SourceFault::NotThatFormat]),
        (refusal("s3://bucket/key", &s3.clone().set("timeout", "soon")), vec![io]),
    ];
    for (refused, expected) in cases {
        assert!(expected.contains(&fault(&refused)), "{refused}");
    }
    for granule in [0, 100, page_size() + 1] {
        let refused = refusal(&file("empty"), &options.clone().granule_bytes(granule));
        assert_eq!(refused.errno(), Errno::EINVAL, "{refused}");
    }
    if std::env::var_os("AWS_ACCESS_KEY_ID").is_some() || std::env::var_os("AWS_WEB_IDENTITY_TOKEN_FILE").is_some() {
        skip!("credentials of S3 are in the environment: that there are none can't be tried");
    }
    // The machine has no metadata service either.
    let s3 = s3.set("aws_metadata_endpoint", format!("http://{closed}")).set("aws_allow_http", "true");
    let refused = refusal("s3://bucket/key", &s3);
    assert_eq!(fault(&refused), SourceFault::Denied, "{refused}");
    assert!(refused.to_string().contains("AWS_ACCESS_KEY_ID"), "{refused}");
}

/// On a machine that trusts no certificates, a store is refused with the cause, unless it is to do without.
#[test]
fn a_machine_without_certificates_is_told() {
    const INNER: &str = "KIOMAP_TEST_NO_CERTIFICATES";
    if std::env::var_os(INNER).is_none() {
        // Where they are is read from the environment, which must not be changed under other threads.
        let outcome = std::process::Command::new(std::env::current_exe().unwrap())
            .args(["a_machine_without_certificates_is_told", "--exact"])
            .envs([("SSL_CERT_FILE", "/nonexistent"), ("SSL_CERT_DIR", "/nonexistent"), (INNER, "1")])
            .output()
            .unwrap();
        let told = String::from_utf8_lossy(&outcome.stdout);
        assert!(outcome.status.success() && told.contains("1 passed"), "{told}");
        return;
    }
    let web = Web::serve(vec![7; 10_000]);
    let options = ObjectOptions::new().deadline(Duration::from_secs(20));
    let refused = refusal(&web.url(), &options).to_string();
    assert!(refused.contains("certificates"), "{refused}");
    let source = ObjectSource::open(&web.url(), &options.set("disable_system_certificates", "true")).unwrap();
    let mut bytes = [0; 100];
    source.read_at(4096, &mut bytes).unwrap();
    assert_eq!(bytes, [7; 100]);
}

/// A server that answers every request with a status, and keeps what it was asked.
fn server_of(status: &'static str) -> (SocketAddr, Arc<Mutex<String>>) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let (address, asked) = (listener.local_addr().unwrap(), Arc::<Mutex<String>>::default());
    let kept = Arc::clone(&asked);
    // Ends with the process.
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let mut stream = stream.unwrap();
            for line in BufReader::new(&stream).lines().map_while(Result::ok).take_while(|line| !line.is_empty()) {
                *kept.lock().unwrap() += &(line + "\n");
            }
            // Whoever has hung up is not missed.
            let _ = write!(stream, "HTTP/1.1 {status}\r\nContent-Length: 0\r\nConnection: close\r\n\r\n");
        }
    });
    (address, asked)
}

/// Passwords and signatures, and what settings hold, are not told to whoever reads an error or a log: whatever a server
/// answers, and whatever is wrong with the URL.
#[test]
fn errors_keep_secrets() {
    let options = ObjectOptions::new().deadline(Duration::from_secs(2));
    for status in ["400 Bad Request", "403 Forbidden", "404 Not Found", "500 Internal Server Error"] {
        let (address, asked) = server_of(status);
        let refused = refusal(&format!("http://hunter1:hunter2@{address}/object"), &options).to_string();
        assert!(refused.starts_with(&format!("http://{address}/object: ")), "{refused}");
        assert!(!refused.contains("hunter"), "{status}: {refused}");
        // The server is told: it is "hunter1:hunter2".
        let asked = asked.lock().unwrap();
        assert!(asked.to_ascii_lowercase().contains("authorization: basic ahvudgvymtpodw50zxiy"), "{asked}");
    }
    for (url, shown) in [
        ("http://user:hunter2@:bad port/object?sig=hunter3", "http:…: "),
        ("foo://user:hunter2@host/object?sig=hunter3", "foo:…: "),
        ("s3:user:hunter2@bucket/key", "s3:…: "),
        ("user hunter2@host:hunter3", "the URL: "),
        ("http://hunter1:hunter2@host/a//b", "http://host/a//b: "),
        ("https://hunter1:hunter2@host/object?sig=hunter3#hunter4", "https://host/object: "),
        ("s3://user:hunter2@bucket/key", "s3://user@bucket/key: "),
    ] {
        let refused = refusal(url, &options).to_string();
        assert!(refused.starts_with(shown) && !refused.contains("hunter"), "{url}: {refused}");
    }
    let options = format!("{:?}", options.set("aws_secret_access_key", "hunter4"));
    assert!(options.contains("aws_secret_access_key") && !options.contains("hunter"), "{options}");
}

/// A name and a password in a URL may hold any byte, and open what they are for.
#[test]
fn a_password_of_any_bytes_is_sent() {
    let (address, asked) = server_of("200 OK");
    // Refused, because it is empty.
    let refused = refusal(&format!("http://us%20er:p%3A%C3%A4@{address}/object"), &ObjectOptions::new());
    assert_eq!(fault(&refused), SourceFault::Empty, "{refused}");
    let expected = BASE64_STANDARD.encode("us er:p:ä");
    assert!(asked.lock().unwrap().contains(&format!("Basic {expected}")), "{}", asked.lock().unwrap());
}

/// What a store would not be asked with is refused, not left away: a signature would else be lost, and another object be read.
#[test]
fn a_url_with_more_than_a_name_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    fs::write(folder.path().join("file"), [7; 100]).unwrap();
    let (address, asked) = server_of("200 OK");
    let file = format!("file://{}/file", folder.path().display());
    for (url, why) in [
        (format!("http://{address}/object?X-Amz-Signature=1234"), "query"),
        (format!("{file}?version=1"), "query"),
        (format!("{file}#1"), "fragment"),
        ("s3://bucket/key?versionId=1".into(), "query"),
        ("https://account.blob.core.windows.net/container/blob?sv=1&sig=2".into(), "query"),
        ("s3://name:secret@bucket/key".into(), "password"),
    ] {
        let refused = refusal(&url, &ObjectOptions::new());
        assert_eq!(fault(&refused), SourceFault::Unsupported, "{refused}");
        assert!(refused.to_string().contains(why), "{refused}");
    }
    assert!(asked.lock().unwrap().is_empty());
    ObjectSource::open(&file, &ObjectOptions::new()).unwrap();
}

/// Reads of one object go on side by side, as many as there are callers.
#[test]
fn reads_of_an_object_go_on_side_by_side() {
    let bytes = contents(64 * page_size(), 36);
    let web = Web::serve(bytes);
    let options = ObjectOptions::new().deadline(Duration::from_millis(1500));
    let source = ObjectSource::open(&web.url(), &options).unwrap();
    web.behave(&[Manners::Stall]);
    let began = Instant::now();
    std::thread::scope(|scope| {
        for n in 0..8 {
            let source = &source;
            scope.spawn(move || assert!(source.read_at(n * page_size() as u64, &mut vec![0; page_size()]).is_err()));
        }
        eventually("eight requests at once", || web.gets.load(Ordering::SeqCst) == 8);
    });
    // One after the other they would have taken eight deadlines.
    assert!(began.elapsed() < DEADLINE);
}

/// Where a server that speaks S3 is, and a bucket of it.
fn s3() -> Option<(ObjectOptions, impl ObjectStore, String)> {
    let endpoint = std::env::var("KIOMAP_S3_ENDPOINT").ok()?;
    let bucket = std::env::var("KIOMAP_S3_BUCKET").expect("KIOMAP_S3_BUCKET goes with KIOMAP_S3_ENDPOINT");
    let settings = [
        ("aws_endpoint", endpoint.as_str()),
        ("aws_region", "us-east-1"),
        ("aws_access_key_id", "someone"),
        ("aws_secret_access_key", "secret"),
        ("aws_allow_http", "true"),
    ];
    let options = settings.iter().fold(ObjectOptions::new(), |options, (key, value)| options.set(*key, *value));
    let builder = settings.iter().fold(AmazonS3Builder::new().with_bucket_name(&bucket), |builder, (key, value)| {
        builder.with_config(key.parse().unwrap(), *value)
    });
    // After a source has been opened, TLS has its provider.
    let _ = refusal(&format!("s3://{bucket}/none"), &options);
    Some((options, builder.build().unwrap(), bucket))
}

/// Skips a test that needs a server where there is none.
macro_rules! needs_s3 {
    () => {
        match s3() {
            Some(found) => found,
            None => skip!("no server that speaks S3 is named by KIOMAP_S3_ENDPOINT: run .ci/object-store"),
        }
    };
}

/// An object of a real server pages in, every page verified by its SHA-256, for eight threads at once.
#[test]
fn an_object_of_an_s3_server_pages_in() {
    needs_sources!();
    let (options, store, bucket) = needs_s3!();
    alone("an_object_of_an_s3_server_pages_in", move || {
        let (bytes, runtime) = (contents((4 << 20) + 321, 37), Runtime::new().unwrap());
        runtime.block_on(store.put(&Path::from("heap"), bytes.clone().into())).unwrap();
        let source = ObjectSource::open(&format!("s3://{bucket}/heap"), &options.granule_bytes(1 << 16)).unwrap();
        assert_eq!((source.len_bytes(), source.granule_bytes()), (Some(bytes.len() as u64), 1 << 16));
        let engine = engine_builder().fault_around_pages(16).build().unwrap();
        let (_vmap, region) = attached(&engine, &list_of(source));
        std::thread::scope(|scope| (0..8).for_each(|_| drop(scope.spawn(|| assert_holds(&region, &bytes)))));
    });
}

/// An object that is put in the place of one that is attached: what is not there yet is SIGBUS, never a byte of the new one.
#[test]
fn an_object_of_an_s3_server_that_is_replaced_is_sigbus() {
    needs_sources!();
    let (options, store, bucket) = needs_s3!();
    alone("an_object_of_an_s3_server_that_is_replaced_is_sigbus", move || {
        let (bytes, runtime) = (contents(64 * page_size(), 38), Runtime::new().unwrap());
        let path = Path::from("replaced");
        runtime.block_on(store.put(&path, bytes.clone().into())).unwrap();
        let url = format!("s3://{bucket}/replaced");
        let source = ObjectSource::open(&url, &options.clone().granule_bytes(page_size())).unwrap();
        let identity = source.identity();
        let engine = engine_builder().fault_around_pages(1).build().unwrap();
        let (_vmap, region) = attached(&engine, &list_of(source));
        for page in 10..20 {
            assert!(support::read_page(&region, page).is_ok());
        }
        runtime.block_on(store.put(&path, contents(bytes.len(), 39).into())).unwrap();
        assert_eq!(right_or_sigbus(&region, &bytes), (10, 54));
        assert_ne!(ObjectSource::open(&url, &options).unwrap().identity(), identity);
        runtime.block_on(store.delete(&path)).unwrap();
        assert_eq!(fault(&refusal(&url, &options)), SourceFault::NotFound);
    });
}

/// What a server refuses is told when it is opened.
#[test]
fn what_an_s3_server_refuses_is_told() {
    let (options, store, bucket) = needs_s3!();
    let options = options.deadline(Duration::from_secs(10));
    let runtime = Runtime::new().unwrap();
    runtime.block_on(store.put(&Path::from("nothing"), Vec::new().into())).unwrap();
    assert_eq!(fault(&refusal(&format!("s3://{bucket}/nothing"), &options)), SourceFault::Empty);
    assert_eq!(fault(&refusal(&format!("s3://{bucket}/none"), &options)), SourceFault::NotFound);
    assert_eq!(fault(&refusal("s3://no-such-bucket-here/key", &options)), SourceFault::NotFound);
}

/// A compressed image in a real server's bucket pages in like one on a disk.
#[cfg(feature = "zstd")]
#[test]
fn a_compressed_image_of_an_s3_server_pages_in() {
    use kiomap::{ZstdImage, ZstdOptions};

    needs_sources!();
    let (options, store, bucket) = needs_s3!();
    alone("a_compressed_image_of_an_s3_server_pages_in", move || {
        let (bytes, mut image) = (contents(3 << 20, 40), Vec::new());
        ZstdImage::make(&bytes[..], &mut image, &ZstdOptions::new(), |_| {}).unwrap();
        Runtime::new().unwrap().block_on(store.put(&Path::from("image.zst"), image.into())).unwrap();
        let object = ObjectSource::open(&format!("s3://{bucket}/image.zst"), &options).unwrap();
        let image = Arc::new(ZstdImage::over(Arc::new(object)).unwrap());
        image.verify(|_| {}).unwrap();
        let engine = engine_builder().build().unwrap();
        let (_vmap, region) = attached(&engine, &image.list().unwrap());
        assert_holds(&region, &bytes);
    });
}
