//! A published vmap: processes that were not forked from the engine's attach, share, fork and die as if they had been.

#[path = "publish/client.rs"]
mod client;
#[path = "publish/raw.rs"]
mod raw;
mod support;

use std::os::unix::fs::{FileTypeExt, PermissionsExt};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use client::{Place, Program};
use kiomap::{
    Access, AttachOptions, Client, ClientOptions, ConnectFault, Error, PublishOptions, Revoke, Shutdown, Vmap,
    page_size,
};
use nix::errno::Errno;
use nix::sys::signal::{Signal, kill};
use support::scene::{GatedSource, areas_of, at, child, settled};
use support::truth::{assert_count, assert_truth};
use support::{
    alone, engine_builder, eventually, list_with_holes, mark, open_descriptors, pages, reap, reap_ok, threads, touch,
    without_poison,
};

/// How soon a fault of a process whose engine has gone must be answered.
const PROMPT: Duration = Duration::from_secs(1);

/// Not a test of its own: what the others start as their clients.
#[test]
#[ignore = "the other tests run it as their client"]
fn a_client_does_what_it_is_told() {
    client::program(|_, words| panic!("told to {words:?}"));
}

fn published(vmap: &Vmap, place: &Place) -> kiomap::Published {
    vmap.publish(place.socket(), PublishOptions::new()).unwrap()
}

/// T49: clients share writes with each other and with the owner; each area is counted, and the callback comes when the last is gone.
#[test]
fn clients_and_the_owner_share_one_memory_and_each_area_is_counted() {
    alone("clients_and_the_owner_share_one_memory_and_each_area_is_counted", || {
        let (engine, place) = (engine_builder().build().unwrap(), Place::new());
        let derefs = Arc::new(AtomicUsize::new(0));
        let counted = Arc::clone(&derefs);
        let vmap = engine
            .vmap_builder(&pages(64))
            .on_deref(move |_| {
                counted.fetch_add(1, Ordering::SeqCst);
            })
            .build()
            .unwrap();
        let published = published(&vmap, &place);
        let mut first = Program::attached(&place.socket());
        assert_eq!(first.number("count"), 1);
        let mut second = Program::attached(&place.socket());
        second.ok("attach 8");
        let region = vmap.attach(&AttachOptions::new()).unwrap();
        assert_eq!((first.number("count"), second.number("count")), (4, 4));
        assert_eq!(areas_of(first.pid()) + areas_of(second.pid()), 3);
        assert_count(&engine, &vmap, 4);
        assert_truth(&engine);
        // Pages that nobody has touched, then each other's writes.
        assert_eq!(first.number("read 40"), u64::from(mark(40)));
        assert_eq!(second.number("read 32"), u64::from(mark(40)));
        first.ok("write 41 7");
        assert_eq!(second.number("read 33"), 7);
        assert_eq!(touch::read(at(&region, 41)), Ok(7));
        touch::write(at(&region, 42), 9).unwrap();
        assert_eq!((first.number("read 42"), second.number("read 34")), (9, 9));
        let mut pids: Vec<_> = published.clients().unwrap().iter().map(|space| (space.pid, space.areas)).collect();
        pids.sort_unstable();
        let mut expected = vec![(first.pid().as_raw(), 1), (second.pid().as_raw(), 2)];
        expected.sort_unstable();
        assert_eq!(pids, expected);
        // A raw unmap is counted as any, when its event has been followed: an area in two pieces is two.
        first.ok("unmap 20");
        assert_count(&engine, &vmap, 5);
        assert_eq!(first.number("count"), 5);
        first.ok("detach");
        second.ok("detach");
        assert_eq!(first.number("count"), 2);
        drop(region);
        assert_eq!(derefs.load(Ordering::SeqCst), 0);
        second.ok("detach");
        eventually("the callback has run", || derefs.load(Ordering::SeqCst) == 1);
        first.end();
        second.end();
        settled(&engine, &vmap, 0);
        assert_eq!(engine.stats().clients_shed, 0);
        assert!(published.clients().unwrap().is_empty());
    });
}

/// T50, T52: clients fork to the third generation; exit, exec and SIGKILL count out what they had.
#[test]
fn clients_fork_and_every_end_of_one_is_counted() {
    alone("clients_fork_and_every_end_of_one_is_counted", || {
        let (engine, place) = (engine_builder().build().unwrap(), Place::new());
        let vmap = engine.vmap(&pages(64)).unwrap();
        let published = published(&vmap, &place);
        let region = vmap.attach(&AttachOptions::new()).unwrap();
        let mut program = Program::attached(&place.socket());
        program.ok("fork 3 10");
        for generation in 0..3 {
            assert_eq!(touch::read(at(&region, 10 + generation)), Ok(103 - generation as u8));
        }
        eventually("the generations are gone", || {
            engine.settle().unwrap();
            vmap.refcount().unwrap() == 2 && published.clients().unwrap().len() == 1
        });
        // A child outlives the client.
        let pid = program.number("fork-touching 64");
        eventually("the child is counted", || vmap.refcount().unwrap() == 3);
        assert_eq!(published.clients().unwrap().len(), 2);
        assert_truth(&engine);
        kill(nix::unistd::Pid::from_raw(pid as i32), Signal::SIGKILL).unwrap();
        eventually("it is gone", || vmap.refcount().unwrap() == 2);
        program.kill();
        settled(&engine, &vmap, 1);
        let mut execs = Program::attached(&place.socket());
        execs.tell("exec");
        settled(&engine, &vmap, 1);
        drop(execs);
        Program::attached(&place.socket()).end();
        settled(&engine, &vmap, 1);
        assert_eq!(published.clients().unwrap().len(), 0);
        assert_eq!(engine.stats().clients_shed, 0);
    });
}

/// T50, T53: killed in the middle of a fault, or of a fork, a client is counted out, and others are served.
#[test]
fn a_client_killed_in_its_faults_is_counted_out() {
    alone("a_client_killed_in_its_faults_is_counted_out", || {
        needs_sources!();
        let (engine, place) = (engine_builder().fault_around_pages(1).build().unwrap(), Place::new());
        if engine.features().contains(kiomap::Features::SIGBUS) {
            skip!("a signal handler asks no source");
        }
        let gated = GatedSource::new();
        let vmap = engine.vmap(&gated.list(256)).unwrap();
        let _published = published(&vmap, &place);
        let mut other = Program::attached(&place.socket());
        for round in 0..10 {
            let mut program = Program::attached(&place.socket());
            gated.shut();
            program.tell(&format!("read {}", 16 * round));
            gated.wait_for_held(1);
            assert_eq!(vmap.refcount().unwrap(), 2);
            program.kill();
            eventually("it is counted out", || vmap.refcount().unwrap() == 1);
            gated.open();
            let mut forking = Program::attached(&place.socket());
            forking.tell("fork-touching 256");
            forking.tell("sum 0 256");
            assert_eq!(other.number(&format!("read {}", 16 * round + 7)), u64::from(mark(16 * round + 7)));
            forking.kill();
            eventually("and so are its children", || {
                engine.settle().unwrap();
                vmap.refcount().unwrap() == 1
            });
        }
        assert_eq!(engine.stats().panics, 0);
    });
}

/// T51: a page that is not there reads as what the list has, whoever touches it first, and never as zeros for everybody.
#[test]
fn no_page_becomes_zeros_by_a_client() {
    alone("no_page_becomes_zeros_by_a_client", || {
        for builder in [engine_builder(), without_poison()] {
            let (engine, place) = (builder.fault_around_pages(1).build().unwrap(), Place::new());
            let vmap = engine.vmap(&list_with_holes(64, |page| page % 5 == 4)).unwrap();
            let _published = published(&vmap, &place);
            let mut program = Program::attached(&place.socket());
            let region = vmap.attach(&AttachOptions::new()).unwrap();
            for page in 0..64 {
                let expected = if page % 5 == 4 { "sigbus".into() } else { mark(page).to_string() };
                assert_eq!(program.ask(&format!("read {page}")), expected);
            }
            for page in (0..64).filter(|page| page % 5 != 4) {
                assert_eq!(touch::read(at(&region, page)), Ok(mark(page)));
            }
        }
    });
}

/// T54, T73: when the owner is killed, what no process had touched is SIGBUS in every client within a second, and never zeros; what was
/// there stays, and is shared.
#[test]
fn when_the_owner_is_killed_clients_get_sigbus_and_no_zeros() {
    alone("when_the_owner_is_killed_clients_get_sigbus_and_no_zeros", || {
        for poisons in [true, false] {
            let place = Place::new();
            let socket = place.socket();
            let owner = child(|| {
                let builder = if poisons { engine_builder() } else { without_poison() };
                let engine = builder.fault_around_pages(1).build().unwrap();
                let vmap = engine.vmap(&pages(256)).unwrap();
                let _published = vmap.publish(&socket, PublishOptions::new()).unwrap();
                loop {
                    std::thread::park();
                }
            });
            eventually("it listens", || {
                std::fs::symlink_metadata(&socket).is_ok_and(|found| found.file_type().is_socket())
                    && Client::attach(&socket, &ClientOptions::new()).is_ok()
            });
            let mut clients: Vec<_> = (0..3).map(|_| Program::attached(&socket)).collect();
            for (n, client) in clients.iter_mut().enumerate() {
                assert_eq!(client.number(&format!("read {n}")), u64::from(mark(n as u64)));
            }
            clients[0].ok("write 0 77");
            kill(owner, Signal::SIGKILL).unwrap();
            let killed = Instant::now();
            for client in &mut clients {
                assert_eq!(client.ask("read 100"), "sigbus");
            }
            assert!(killed.elapsed() < PROMPT, "{:?}", killed.elapsed());
            let _ = reap(owner);
            for client in &mut clients {
                assert_eq!(client.ask("zeros 0 256"), "0 zeros, 253 refused");
                assert_eq!(client.number("read 0"), 77);
            }
            clients[1].ok("write 1 78");
            assert_eq!(clients[2].number("read 1"), 78);
            // A child of a client that has no engine has none of the memory, and a new client finds nobody.
            assert_ne!(clients[0].ask("fork 1 0"), "ok");
            assert!(Program::start(&socket).ask("connect").contains("nobody can be reached"));
            clients.into_iter().for_each(Program::end);
        }
    });
}

/// T55: a shutdown ends the listening; clients keep what is there, and get SIGBUS for the rest.
#[test]
fn a_shutdown_lets_clients_go() {
    alone("a_shutdown_lets_clients_go", || {
        for how in [Shutdown::Poison, Shutdown::Fill] {
            let (engine, place) = (engine_builder().fault_around_pages(1).build().unwrap(), Place::new());
            let vmap = engine.vmap(&pages(64)).unwrap();
            let published = published(&vmap, &place);
            let mut program = Program::attached(&place.socket());
            assert_eq!(program.number("read 3"), u64::from(mark(3)));
            engine.shutdown(how).unwrap();
            eventually("the socket is gone", || !place.socket().exists());
            assert_eq!(program.number("read 3"), u64::from(mark(3)));
            let expected = if how == Shutdown::Poison { "sigbus".into() } else { mark(4).to_string() };
            assert_eq!(program.ask("read 4"), expected);
            assert!(program.ask("attach 0").contains("shut down"));
            assert_eq!(vmap.publish(place.socket(), PublishOptions::new()).unwrap_err().errno(), Errno::ESHUTDOWN);
            drop(published);
            program.end();
        }
        eventually("no listener is left", || !threads().iter().any(|name| name == "kiomap-publish"));
    });
}

/// Thousands of clients come and go, in processes of their own and within one: nothing is left of them anywhere.
#[test]
fn a_thousand_clients_come_and_go_without_a_trace() {
    alone("a_thousand_clients_come_and_go_without_a_trace", || {
        let (engine, place) = (engine_builder().build().unwrap(), Place::new());
        let vmap = engine.vmap(&pages(16)).unwrap();
        let published = published(&vmap, &place);
        // What the first brings along stays: workers, buffers.
        Program::attached(&place.socket()).end();
        settled(&engine, &vmap, 0);
        let (descriptors, nr_threads) = (open_descriptors(), threads().len());
        let mut programs: Vec<_> = (0..5).map(|_| Program::start(&place.socket())).collect();
        programs.iter_mut().for_each(|program| program.tell("come-and-go 1"));
        programs.iter_mut().for_each(|program| assert_eq!(program.hear(), "ok"));
        let before: Vec<_> =
            programs.iter_mut().map(|program| (program.number("descriptors"), program.number("threads"))).collect();
        programs.iter_mut().for_each(|program| program.tell("come-and-go 200"));
        programs.iter_mut().for_each(|program| assert_eq!(program.hear(), "ok"));
        for (program, (descriptors, nr_threads)) in programs.iter_mut().zip(before) {
            assert_eq!(program.number("descriptors"), descriptors);
            eventually("its guards have ended", || program.number("threads") <= nr_threads);
        }
        programs.into_iter().for_each(Program::end);
        for _ in 0..25 {
            let mut programs: Vec<_> = (0..4).map(|_| Program::start(&place.socket())).collect();
            programs.iter_mut().for_each(|program| program.tell("connect"));
            for (n, program) in programs.iter_mut().enumerate() {
                assert_eq!(program.hear(), "ok");
                program.ok("attach 0");
                assert_eq!(program.number("read 5"), u64::from(mark(5)));
                if n % 2 == 0 {
                    program.kill();
                }
            }
        }
        settled(&engine, &vmap, 0);
        assert!(published.clients().unwrap().is_empty());
        eventually("descriptors are back", || open_descriptors() == descriptors);
        assert_eq!(threads().len(), nr_threads);
        assert_eq!((engine.spaces().unwrap().len(), engine.stats().clients_shed), (1, 0));
    });
}

/// The policy decides, by what the kernel says of who connects; a panic of it is a no.
#[test]
fn the_policy_decides_who_gets_what() {
    alone("the_policy_decides_who_gets_what", || {
        let (engine, place) = (engine_builder().build().unwrap(), Place::new());
        let vmap = engine.vmap(&pages(8)).unwrap();
        let asked = Arc::new(AtomicUsize::new(0));
        let seen = Arc::clone(&asked);
        let policy = move |peer: &kiomap::PeerCredentials| {
            seen.store(peer.pid as usize, Ordering::SeqCst);
            assert_eq!((peer.uid, peer.gid), (nix::unistd::geteuid().as_raw(), nix::unistd::getegid().as_raw()));
            if peer.pid % 2 == 0 { Access::ReadWrite } else { Access::Refused }
        };
        let published = vmap.publish(place.socket(), PublishOptions::new().policy(policy)).unwrap();
        for _ in 0..6 {
            let mut program = Program::start(&place.socket());
            let answer = program.ask("connect");
            let pid = program.pid().as_raw() as usize;
            assert_eq!(asked.load(Ordering::SeqCst), pid);
            assert_eq!(answer == "ok", pid.is_multiple_of(2), "{answer}");
            assert!(answer == "ok" || answer.contains("policy refuses"), "{answer}");
        }
        drop(published);
        let panicking = PublishOptions::new().policy(|_| panic!("a bug of the policy"));
        let published = vmap.publish(place.socket(), panicking).unwrap();
        assert!(Program::start(&place.socket()).ask("connect").contains("policy refuses"));
        assert_eq!(engine.stats().panics, 1);
        drop(published);
        let few = vmap.publish(place.socket(), PublishOptions::new().processes(2)).unwrap();
        let first = Program::connected(&place.socket());
        let mut second = Program::attached(&place.socket());
        assert!(Program::start(&place.socket()).ask("connect").contains("as many processes as it may"));
        assert_ne!(second.ask("fork 1 0"), "ok", "a child is a process, too");
        drop(first);
        eventually("its place is free", || few.clients().unwrap().len() == 1);
        second.ok("fork 1 0");
        drop((second, few));
        eventually("nobody is served", || engine.spaces().unwrap().len() == 1);
        let options = PublishOptions::new().processes(4).processes_per_client(2);
        let few = vmap.publish(place.socket(), options).unwrap();
        let mut first = Program::attached(&place.socket());
        first.ok("fork 1 1");
        eventually("its child has ended", || few.clients().unwrap().len() == 1);
        assert_ne!(first.ask("fork 2 2"), "ok", "there is a place for one of them");
        eventually("they have ended", || few.clients().unwrap().len() == 1);
        // Another one has places of its own.
        Program::attached(&place.socket()).ok("fork 1 4");
        first.ok("fork 1 5");
    });
}

/// Who gets nothing: by the mode of the socket, by the version, in time; a path in use is not taken.
#[test]
fn what_stands_in_the_way_is_named() {
    alone("what_stands_in_the_way_is_named", || {
        let (engine, place) = (engine_builder().build().unwrap(), Place::new());
        let vmap = engine.vmap(&pages(4)).unwrap();
        let socket = place.socket();
        let fault = |path: &std::path::Path| match Client::attach(
            path,
            &ClientOptions::new().timeout(Duration::from_millis(300)),
        ) {
            Err(Error::NotConnected { fault, .. }) => fault,
            other => panic!("{other:?}"),
        };
        assert_eq!(fault(&socket), ConnectFault::Unreachable(Errno::ENOENT));
        assert_eq!(fault(&place.beside(&"x".repeat(200))), ConnectFault::Unreachable(Errno::ENAMETOOLONG));
        let published = vmap.publish(&socket, PublishOptions::new().mode(0o640)).unwrap();
        assert_eq!(published.path(), socket);
        assert_eq!(socket.metadata().unwrap().permissions().mode() & 0o7777, 0o640);
        // Somebody listens.
        assert_eq!(vmap.publish(&socket, PublishOptions::new()).unwrap_err().errno(), Errno::EADDRINUSE);
        let file = place.beside("file");
        std::fs::write(&file, "not a socket").unwrap();
        assert_eq!(vmap.publish(&file, PublishOptions::new()).unwrap_err().errno(), Errno::EADDRINUSE);
        assert_eq!(std::fs::read(&file).unwrap(), b"not a socket");
        drop(published);
        assert!(!socket.exists());
        // Nobody listens any more where a process was killed.
        reap_ok(child(|| std::mem::forget(vmap_of_its_own(&socket))));
        assert_eq!(fault(&socket), ConnectFault::Unreachable(Errno::ECONNREFUSED));
        let published = vmap.publish(&socket, PublishOptions::new()).unwrap();
        Program::attached(&socket).end();
        // Somebody else took the path: it is not removed.
        std::fs::remove_file(&socket).unwrap();
        std::fs::write(&socket, "another's").unwrap();
        drop(published);
        assert!(socket.exists());
        // Another protocol, and nobody who answers.
        let other = place.beside("other");
        let listener = std::os::unix::net::UnixListener::bind(&other).unwrap();
        assert_eq!(fault(&other), ConnectFault::Unreachable(Errno::EPROTOTYPE));
        drop(listener);
    });
}

fn vmap_of_its_own(socket: &std::path::Path) -> (kiomap::Engine, kiomap::Published) {
    let engine = engine_builder().build().unwrap();
    let published = engine.vmap(&pages(4)).unwrap().publish(socket, PublishOptions::new()).unwrap();
    (engine, published)
}

/// What an owner does to a vmap is seen by clients as by forked children; what only it can do, it alone can.
#[test]
fn clients_see_what_the_owner_does() {
    alone("clients_see_what_the_owner_does", || {
        let (engine, place) = (engine_builder().fault_around_pages(1).build().unwrap(), Place::new());
        let vmap = engine.vmap_builder(&pages(8)).expandable().build().unwrap();
        let published = published(&vmap, &place);
        let mut program = Program::attached(&place.socket());
        assert!(program.ask("expand").contains("only possible in the process that created the engine"));
        assert_eq!(program.number("read 2"), u64::from(mark(2)));
        vmap.expand(&pages(8)).unwrap();
        let mut later = Program::attached(&place.socket());
        assert_eq!(later.number("read 9"), u64::from(mark(1)));
        vmap.revoke(Revoke::Soft).unwrap();
        assert_eq!((program.ask("read 2"), program.ask("read 3")), (mark(2).to_string(), "sigbus".into()));
        vmap.revoke(Revoke::Hard).unwrap();
        assert_eq!((program.ask("read 2"), later.ask("read 9")), ("sigbus".into(), "sigbus".into()));
        // Handles go, the served stay.
        drop((published, vmap));
        assert_eq!(program.ask("write 2 1"), "sigbus");
        assert_eq!(program.number("own-engine"), u64::from(mark(3)));
    });
}

/// A memfd that is shown itself is a client's too, also where the engine maps what it holds.
#[test]
fn clients_share_a_memfd_that_is_shown_itself() {
    alone("clients_share_a_memfd_that_is_shown_itself", || {
        use std::os::unix::fs::FileExt;
        needs_sources!();
        for minor_faults in [false, true] {
            let (engine, place) = (engine_builder().build().unwrap(), Place::new());
            if minor_faults && engine.features().contains(kiomap::Features::SIGBUS) {
                skip!("a signal handler answers no minor faults");
            }
            let seals = nix::sys::memfd::MFdFlags::MFD_CLOEXEC | nix::sys::memfd::MFdFlags::MFD_ALLOW_SEALING;
            let memfd = std::fs::File::from(nix::sys::memfd::memfd_create("shown", seals).unwrap());
            let bytes = 64 * page_size() as u64;
            memfd.set_len(bytes).unwrap();
            nix::fcntl::fcntl(&memfd, nix::fcntl::FcntlArg::F_ADD_SEALS(nix::fcntl::SealFlag::F_SEAL_GROW)).unwrap();
            for page in 0..32 {
                memfd.write_all_at(&[mark(page)], page * page_size() as u64).unwrap();
            }
            let mut list = kiomap::Kiobuf::new();
            list.map_memfd(&memfd, 0..bytes).unwrap();
            let builder = engine.vmap_builder(&list).backing(kiomap::Backing::Shared);
            let vmap = if minor_faults { builder.minor_faults() } else { builder }.build().unwrap();
            let _published = published(&vmap, &place);
            let mut program = Program::attached(&place.socket());
            assert_eq!((program.number("read 5"), program.number("read 40")), (u64::from(mark(5)), 0));
            program.ok("write 6 77");
            let mut byte = [0];
            memfd.read_exact_at(&mut byte, 6 * page_size() as u64).unwrap();
            assert_eq!((byte, engine.stats().faults_minor > 0), ([77], minor_faults));
            program.ok("fork 2 20");
            program.end();
            settled(&engine, &vmap, 0);
        }
    });
}

/// Huge pages come to clients whole.
#[test]
fn clients_get_huge_pages() {
    support::pool::with_pool("clients_get_huge_pages", || {
        let (engine, place) = (engine_builder().build().unwrap(), Place::new());
        if engine.features().contains(kiomap::Features::SIGBUS) {
            skip!("a signal handler brings base pages only");
        }
        let per_huge = support::pool::per_huge();
        let vmap = engine.vmap_builder(&pages(2 * per_huge)).page_size(kiomap::PageSize::Huge2M).build().unwrap();
        let _published = published(&vmap, &place);
        let mut program = Program::attached(&place.socket());
        for page in [3, per_huge + 5] {
            assert_eq!(program.number(&format!("read {page}")), u64::from(mark(page)));
        }
        assert_eq!(engine.stats().faults, 2);
        program.ok(&format!("fork 1 {per_huge}"));
        program.kill();
        settled(&engine, &vmap, 0);
    });
}

/// A client believes nobody: another version is named, silence has an end, and what is no sealed memory of that size is not mapped.
#[test]
fn a_client_looks_at_what_it_is_offered() {
    alone("a_client_looks_at_what_it_is_offered", || {
        use nix::fcntl::{FcntlArg, SealFlag, fcntl};
        use nix::sys::memfd::{MFdFlags, memfd_create};
        let place = Place::new();
        let mut next = 0;
        let mut fault = |says: Vec<(Vec<u8>, Vec<std::os::fd::OwnedFd>)>, closes| {
            next += 1;
            let path = place.beside(&format!("impostor-{next}"));
            raw::impostor(&path, says, closes);
            match Client::attach(&path, &ClientOptions::new().timeout(Duration::from_millis(200))) {
                Err(Error::NotConnected { fault, .. }) => fault,
                other => panic!("{other:?}"),
            }
        };
        assert_eq!(fault(vec![], false), ConnectFault::TimedOut);
        assert_eq!(fault(vec![], true), ConnectFault::Closed);
        assert_eq!(fault(vec![(b"HTTP/1.1 400 Bad Request".to_vec(), vec![])], false), ConnectFault::Protocol);
        for theirs in [0, 2, 77] {
            let says = vec![([raw::header(theirs), vec![5]].concat(), vec![])];
            let (fault, ours) = (fault(says, false), raw::VERSION);
            assert_eq!(fault, ConnectFault::Version { theirs, ours });
            assert!(fault.to_string().contains(&format!("version {theirs}")), "{fault}");
        }
        let page = page_size() as u64;
        let memfd = |bytes: u64, seals: SealFlag| {
            let memfd = memfd_create("impostor", MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING).unwrap();
            nix::unistd::ftruncate(&memfd, bytes as i64).unwrap();
            fcntl(&memfd, FcntlArg::F_ADD_SEALS(seals)).unwrap();
            memfd
        };
        let sealed = SealFlag::F_SEAL_SHRINK | SealFlag::F_SEAL_GROW;
        // Offer: vmap, pages, their size, base; shared, expandable, minor faults, residency; features; for reading only.
        let offer = |nr_pages, page_bytes, base, residency, read_only| {
            raw::frame(&[0, 1, nr_pages, page_bytes, base, 0, 0, 0, residency, 0, read_only])
        };
        let owner = || (raw::frame(&[1]), vec![support::pidfd(nix::unistd::Pid::this())]);
        for (offer, memfd, expected) in [
            (offer(4, page, 0, 0, 0), memfd(3 * page, sealed), ConnectFault::Memory),
            (offer(4, page, 0, 0, 0), memfd(4 * page, SealFlag::F_SEAL_GROW), ConnectFault::Memory),
            (offer(4, page, 0, 0, 0), memfd(4 * page, SealFlag::F_SEAL_SHRINK), ConnectFault::Memory),
            (offer(4, page + 1, 0, 0, 0), memfd(4 * page, sealed), ConnectFault::Memory),
            (offer(4, 2 << 20, 0, 0, 0), memfd(2 << 20, sealed), ConnectFault::Memory),
            (offer(3, page, 1, 0, 0), memfd(4 * page, sealed), ConnectFault::Memory),
            (offer(u64::MAX, page, 0, 0, 0), memfd(4 * page, sealed), ConnectFault::Memory),
            (offer(4, page, 0, 0, 1), memfd(4 * page, sealed), ConnectFault::Memory),
            (offer(4, page, 0, 9, 0), memfd(4 * page, sealed), ConnectFault::Protocol),
            (offer(4, page, 0, 0, 0), std::fs::File::open("/dev/null").unwrap().into(), ConnectFault::Memory),
        ] {
            assert_eq!(fault(vec![(offer, vec![memfd]), owner()], false), expected);
        }
        // Nothing at all came along.
        assert_eq!(fault(vec![(offer(4, page, 0, 0, 0), vec![]), owner()], false), ConnectFault::Protocol);
        assert_eq!(fault(vec![(offer(4, page, 0, 0, 0), vec![memfd(4 * page, sealed)])], true), ConnectFault::Closed);
        // Its end would never be seen.
        let offered = (offer(4, page, 0, 0, 0), vec![memfd(4 * page, sealed)]);
        let no_process = (raw::frame(&[1]), vec![memfd(0, SealFlag::empty())]);
        assert_eq!(fault(vec![offered, no_process], false), ConnectFault::Protocol);
    });
}

/// Who may read only maps the pages without the engine, is counted, and finds every page, also when the owner is gone.
#[test]
fn a_client_that_reads_only_is_counted_and_has_every_page() {
    alone("a_client_that_reads_only_is_counted_and_has_every_page", || {
        let (engine, place) = (engine_builder().build().unwrap(), Place::new());
        let vmap = engine.vmap(&pages(64)).unwrap();
        let mut filled = 0;
        let options = PublishOptions::new().read_only_clients(true);
        let published = vmap
            .publish_with(place.socket(), options, |progress| {
                filled = progress.pages_done;
                std::ops::ControlFlow::Continue(())
            })
            .unwrap();
        assert_eq!(filled, 64);
        let mut writer = Program::attached(&place.socket());
        let mut reader = Program::start(&place.socket());
        reader.ok("connect-reading");
        assert!(reader.ask("attach 0").contains("read only"));
        reader.ok("attach-reading 0");
        reader.ok("attach-reading 8");
        assert_eq!((reader.number("count"), vmap.refcount().unwrap()), (3, 3));
        writer.ok("write 9 5");
        assert_eq!(reader.number("read 1"), 5);
        assert_eq!(reader.ask("write 1 6"), "sigsegv");
        reader.ok("detach");
        assert_eq!(vmap.refcount().unwrap(), 2);
        // A child has none of it, rather than something that is not counted.
        assert_ne!(reader.ask("fork 1 0"), "ok");
        assert_eq!(vmap.revoke(Revoke::Hard).unwrap_err().errno(), Errno::EINVAL);
        vmap.revoke(Revoke::Soft).unwrap();
        assert_eq!(reader.ask("zeros 0 64"), "0 zeros, 0 refused");
        let mut other = Program::start(&place.socket());
        other.ok("connect-reading");
        other.ok("attach-reading 0");
        assert_eq!(vmap.refcount().unwrap(), 3);
        other.kill();
        eventually("it is counted out", || vmap.refcount().unwrap() == 2);
        drop(published);
        engine.shutdown(Shutdown::Poison).unwrap();
        assert_eq!(reader.ask("zeros 0 64"), "0 zeros, 0 refused");
        reader.end();
    });
}

/// Read-only access is granted where it was prepared, and what can't be made whole is not published so.
#[test]
fn read_only_access_is_prepared_or_refused() {
    alone("read_only_access_is_prepared_or_refused", || {
        let (engine, place) = (engine_builder().build().unwrap(), Place::new());
        let vmap = engine.vmap(&pages(8)).unwrap();
        let for_reading = || PublishOptions::new().read_only_clients(true).policy(|_| Access::ReadOnly);
        let unprepared = vmap.publish(place.socket(), PublishOptions::new().policy(|_| Access::ReadOnly)).unwrap();
        assert!(Program::start(&place.socket()).ask("connect-reading").contains("policy refuses"));
        drop(unprepared);
        let prepared = vmap.publish(place.socket(), for_reading()).unwrap();
        assert!(Program::start(&place.socket()).ask("connect").contains("for reading only"));
        Program::start(&place.socket()).ok("connect-reading");
        drop(prepared);
        let refused = |vmap: &Vmap| vmap.publish(place.socket(), for_reading()).unwrap_err();
        assert_eq!(refused(&engine.vmap(&list_with_holes(8, |page| page == 3)).unwrap()).errno(), Errno::EINVAL);
        assert_eq!(refused(&engine.vmap_builder(&pages(8)).expandable().build().unwrap()).errno(), Errno::EINVAL);
        let revoked = engine.vmap(&pages(8)).unwrap();
        revoked.revoke(Revoke::Soft).unwrap();
        assert_eq!(refused(&revoked).errno(), Errno::EINVAL);
        // One that has every page has them after that, too.
        vmap.revoke(Revoke::Soft).unwrap();
        drop(vmap.publish(place.socket(), for_reading()).unwrap());
        let broken_off = vmap_broken_off(&engine, &place);
        assert!(matches!(broken_off, Error::NotPopulated { pgoff: 0, wanted: 600, .. }), "{broken_off:?}");
        assert!(!place.socket().exists());
    });
}

fn vmap_broken_off(engine: &kiomap::Engine, place: &Place) -> Error {
    let vmap = engine.vmap(&pages(600)).unwrap();
    let options = PublishOptions::new().read_only_clients(true);
    let error = vmap.publish_with(place.socket(), options, |_| std::ops::ControlFlow::Break(())).unwrap_err();
    // Its pages can be taken away as before.
    vmap.revoke(Revoke::Hard).unwrap();
    error
}

/// U16: another user who may read only tries everything that the kernel offers to change what others see. Nothing changes.
#[test]
fn another_user_who_reads_only_changes_nothing() {
    alone("another_user_who_reads_only_changes_nothing", || {
        use std::os::fd::AsRawFd;
        if !nix::unistd::geteuid().is_root() {
            skip!("only root can be another user");
        }
        const NOBODY: u32 = 65534;
        let (engine, place) = (engine_builder().build().unwrap(), Place::new());
        let vmap = engine.vmap(&pages(64)).unwrap();
        let region = vmap.attach(&AttachOptions::new()).unwrap();
        let policy =
            |peer: &kiomap::PeerCredentials| if peer.uid == NOBODY { Access::ReadOnly } else { Access::ReadWrite };
        let options = PublishOptions::new().read_only_clients(true).mode(0o666).policy(policy);
        let _published = vmap.publish(place.socket(), options).unwrap();
        let folder = place.socket().parent().unwrap().to_owned();
        std::fs::set_permissions(&folder, std::fs::Permissions::from_mode(0o755)).unwrap();
        // The test binary may lie where another user can't read: it becomes that user in the middle.
        let mut other = Program::start(&place.socket());
        other.ok("connect");
        other.ok("attach 0");
        let socket = place.socket();
        let attacker = child(|| {
            drop(region);
            nix::unistd::setgroups(&[]).unwrap();
            nix::unistd::setresgid(NOBODY.into(), NOBODY.into(), NOBODY.into()).unwrap();
            nix::unistd::setresuid(NOBODY.into(), NOBODY.into(), NOBODY.into()).unwrap();
            // SAFETY: a plain system call: otherwise its own folder in /proc is root's.
            unsafe { libc::prctl(libc::PR_SET_DUMPABLE, 1) };
            // For writing it gets nothing.
            assert_eq!(Client::attach(&socket, &ClientOptions::new()).unwrap_err().errno(), Errno::EROFS);
            let line = raw::Line::connect(&socket);
            line.say(&raw::frame(&[0, 1]), &[]).unwrap();
            let memfd = line.hear().unwrap().descriptors.pop().unwrap();
            attack(&memfd);
            // As its owner's the engine's process and its descriptors are out of reach, too.
            let parent = nix::unistd::getppid();
            assert!(std::fs::read_dir(format!("/proc/{parent}/fd")).is_err());
            let path = format!("/proc/self/fd/{}", memfd.as_raw_fd());
            assert!(std::fs::write(path, "x").is_err());
        });
        reap_ok(attacker);
        let region = vmap.attach(&AttachOptions::new()).unwrap();
        for page in 0..64 {
            assert_eq!(touch::read(at(&region, page)), Ok(mark(page)));
            assert_eq!(other.number(&format!("read {page}")), u64::from(mark(page)));
        }
        assert_eq!(engine.stats().panics, 0);
    });
}

/// Everything that a descriptor for reading might be abused for.
fn attack(memfd: &std::os::fd::OwnedFd) {
    use std::os::fd::AsRawFd;

    use nix::fcntl::{FallocateFlags, FcntlArg, OFlag, SealFlag, fallocate, fcntl, open};
    use nix::sys::stat::Mode;
    let len = 64 * page_size();
    let path = format!("/proc/self/fd/{}", memfd.as_raw_fd());
    for way in [OFlag::O_RDWR, OFlag::O_WRONLY, OFlag::O_RDWR | OFlag::O_TRUNC] {
        assert_eq!(open(path.as_str(), way, Mode::empty()).unwrap_err(), Errno::EACCES);
    }
    assert_eq!(nix::sys::stat::fchmod(memfd, Mode::from_bits_truncate(0o666)), Err(Errno::EPERM));
    assert_eq!(nix::unistd::write(memfd, b"zero"), Err(Errno::EBADF));
    assert_eq!(nix::sys::uio::pwrite(memfd, &[0; 64], 0), Err(Errno::EBADF));
    assert!(nix::unistd::ftruncate(memfd, 0).is_err());
    let punch = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
    assert_eq!(fallocate(memfd, punch, 0, len as i64), Err(Errno::EBADF));
    assert!(fcntl(memfd, FcntlArg::F_ADD_SEALS(SealFlag::F_SEAL_WRITE)).is_err());
    let map = |access, flags| {
        // SAFETY: a new mapping where the kernel likes.
        unsafe { libc::mmap(std::ptr::null_mut(), len, access, flags, memfd.as_raw_fd(), 0) }
    };
    assert_eq!(map(libc::PROT_READ | libc::PROT_WRITE, libc::MAP_SHARED), libc::MAP_FAILED);
    let mapped = map(libc::PROT_READ, libc::MAP_SHARED);
    assert_ne!(mapped, libc::MAP_FAILED);
    // SAFETY: the mapping is ours, and nothing refers to it.
    unsafe {
        assert_ne!(libc::mprotect(mapped, len, libc::PROT_READ | libc::PROT_WRITE), 0);
        assert_ne!(libc::madvise(mapped, len, libc::MADV_REMOVE), 0);
        libc::madvise(mapped, len, libc::MADV_DONTNEED);
        libc::madvise(mapped, len, libc::MADV_POPULATE_READ);
    }
    for page in 0..64 {
        assert_eq!(touch::read(mapped.cast::<u8>().wrapping_add(page * page_size())), Ok(mark(page as u64)));
    }
    // A copy of its own is its own.
    let private = map(libc::PROT_READ | libc::PROT_WRITE, libc::MAP_PRIVATE);
    assert_eq!(touch::write(private.cast(), 0), Ok(()));
}
