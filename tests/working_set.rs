//! Working sets: which pages are recorded, how they are kept, and what a replay of them brings.

mod support;

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, SystemTime};

use kiomap::{
    AttachOptions, Backing, Delivery, Engine, Error, FaultAround, Kiobuf, PageSize, PageSource, PopulateOptions,
    Region, Revoke, Shutdown, Vmap, WorkingSet, WorkingSetFault, page_size,
};
use nix::errno::Errno;
use support::pool::{HUGE, per_huge, with_pool};
use support::populating::{assert_marks, bytes, mapped, slow};
use support::scene::{GatedSource, Rng, at, child};
use support::{
    alone, assert_sigbus, engine_builder, eventually, fill_marks, holes, mark, pages, reap_ok, settled_stats, touch,
};

/// One page a fault, so that what is touched is what is faulted on.
fn engine() -> Engine {
    engine_builder().fault_around_pages(1).build().unwrap()
}

/// A vmap of a list whose working set is recorded, and a region of all of it.
fn recorded(engine: &Engine, list: &Kiobuf) -> (Vmap, Region) {
    let vmap = engine.vmap_builder(list).record_working_set().build().unwrap();
    let region = vmap.attach(&AttachOptions::new()).unwrap();
    (vmap, region)
}

/// The pages that were recorded, after every fault so far is counted.
fn recorded_pages(engine: &Engine, vmap: &Vmap) -> Vec<u64> {
    engine.settle().unwrap();
    vmap.working_set().unwrap().pages().to_vec()
}

#[track_caller]
fn touch_all(region: &Region, pages: impl IntoIterator<Item = u64>) {
    pages.into_iter().for_each(|page| assert_eq!(touch::read(at(region, page)), Ok(mark(page)), "page {page}"));
}

/// Different pages in an order that looks random.
fn some_pages(nr_pages: u64, number: usize, seed: u64) -> Vec<u64> {
    let mut pages: Vec<u64> = (0..nr_pages).collect();
    Rng::new(seed).shuffle(&mut pages);
    pages.truncate(number);
    pages
}

#[track_caller]
fn fault_of<T: std::fmt::Debug>(outcome: kiomap::Result<T>) -> WorkingSetFault {
    match outcome {
        Err(Error::WorkingSet(fault)) => fault,
        other => panic!("{other:?}"),
    }
}

/// What is faulted on is recorded, once and in order, whatever kind of page it is and whoever touches it; what came along,
/// was populated, read by the owner, or could not be had is not.
#[test]
fn what_is_faulted_on_is_recorded_in_order() {
    alone("what_is_faulted_on_is_recorded_in_order", || {
        let engine = engine();
        let list = Kiobuf::concat(&[pages(300), holes(10), slow(300)]).unwrap();
        let (vmap, region) = recorded(&engine, &list);
        assert!(recorded_pages(&engine, &vmap).is_empty());
        let touched = some_pages(300, 80, 1);
        touch_all(&region, touched.iter().copied());
        touch_all(&region, touched.iter().copied().rev());
        assert_eq!(recorded_pages(&engine, &vmap), touched);
        // A page of a source, in another region; a write; a page that is there by now.
        let other = vmap.attach(&AttachOptions::new().pgoff(310)).unwrap();
        assert_eq!(touch::read(at(&other, 7)), Ok(mark(7)));
        assert_eq!(touch::read(at(&region, 317)), Ok(mark(7)));
        let untouched = (0..300).find(|page| !touched.contains(page)).unwrap();
        touch::write(at(&region, untouched), 9).unwrap();
        let expected = [&touched[..], &[317, untouched]].concat();
        assert_eq!(recorded_pages(&engine, &vmap), expected);
        // None of these is a fault.
        assert_sigbus(&region, 305);
        region.populate(bytes(400..500)).unwrap();
        region.populate_in_background(bytes(500..510), PopulateOptions::new()).unwrap().wait().unwrap();
        vmap.read_at(550 * page_size() as u64, &mut [0; 10]).unwrap();
        touch::read(at(&region, 450)).unwrap();
        touch::read(at(&region, 550)).unwrap();
        assert_eq!(recorded_pages(&engine, &vmap), expected);
        // A child's faults are.
        reap_ok(child(|| {
            touch::read(at(&region, 599)).unwrap();
            assert_eq!(vmap.working_set().unwrap_err().errno(), Errno::EPERM);
        }));
        assert_eq!(recorded_pages(&engine, &vmap), [&expected[..], &[599]].concat());
    });
}

/// What comes with a page that was touched is not recorded.
#[test]
fn what_comes_along_is_not_recorded() {
    alone("what_comes_along_is_not_recorded", || {
        for around in [FaultAround::Fixed(16), FaultAround::default()] {
            let engine = engine_builder().fault_around(around).build().unwrap();
            let (vmap, region) = recorded(&engine, &pages(1000));
            touch_all(&region, 0..1000);
            let recorded = recorded_pages(&engine, &vmap);
            assert_eq!(recorded.len() as u64, settled_stats(&engine).faults, "{around:?}");
            assert!(recorded.len() <= 1000 / 15 && recorded.is_sorted(), "{around:?}: {recorded:?}");
        }
    });
}

/// Every thread that answers faults records them: the members of a crew, and the threads that bring their pages themselves.
#[test]
fn whoever_answers_a_fault_records_it() {
    alone("whoever_answers_a_fault_records_it", || {
        let crew = || engine_builder().handlers(4).handlers_standing_by(true);
        let in_thread = || {
            touch::prepare();
            engine_builder().delivery(Delivery::InThread)
        };
        for builder in [crew(), in_thread()] {
            let engine = builder.fault_around_pages(1).build().unwrap();
            let (vmap, region) = recorded(&engine, &pages(4000));
            let touched = some_pages(4000, 3000, 2);
            std::thread::scope(|scope| {
                for part in touched.chunks(750) {
                    let region = &region;
                    scope.spawn(move || touch_all(region, part.iter().copied()));
                }
            });
            let (mut expected, mut recorded) = (touched, recorded_pages(&engine, &vmap));
            expected.sort_unstable();
            recorded.sort_unstable();
            assert_eq!(recorded, expected);
        }
    });
}

/// Of huge pages the first of each is recorded, and replayed as a whole.
#[test]
fn huge_pages_are_recorded_and_replayed_whole() {
    with_pool("huge_pages_are_recorded_and_replayed_whole", || {
        let (engine, huge) = (engine_builder().delivery(Delivery::Handler).build().unwrap(), per_huge());
        let list = pages(4 * huge);
        let build = || engine.vmap_builder(&list).page_size(PageSize::Huge2M).record_working_set().build().unwrap();
        let vmap = build();
        let region = vmap.attach(&AttachOptions::new()).unwrap();
        touch_all(&region, [3 * huge + 7, 5, 3 * huge]);
        assert_eq!(recorded_pages(&engine, &vmap), [3 * huge, 0]);
        let set = vmap.working_set().unwrap();
        drop((vmap, region));
        let again = build().attach(&AttachOptions::new()).unwrap();
        let done = again.replay(&set, PopulateOptions::new()).unwrap().wait().unwrap();
        assert_eq!((done.pages_done, done.pages_total, done.pages_failed), (2 * huge, 2 * huge, 0));
        assert_eq!(mapped(&again), 2 * HUGE as u64 / page_size() as u64);
        assert_marks(&again, 3 * huge..4 * huge);
    });
}

/// Of a memfd that is shown itself, the pages are recorded whose minor faults the engine answers.
#[test]
fn minor_faults_are_recorded() {
    alone("minor_faults_are_recorded", || {
        if support::taken_away().contains(kiomap::Features::THREAD_ID) {
            skip!("without THREAD_ID there are no minor faults");
        }
        let engine = engine_builder().delivery(Delivery::Handler).fault_around_pages(1).build().unwrap();
        let mut arena = kiomap::Arena::shared(50).unwrap();
        fill_marks(0, &mut arena);
        let mut list = Kiobuf::new();
        list.map_kernel(arena).unwrap();
        let vmap = engine.vmap_builder(&list).minor_faults().record_working_set().build().unwrap();
        let region = vmap.attach(&AttachOptions::new()).unwrap();
        touch_all(&region, [40, 3]);
        assert_eq!(recorded_pages(&engine, &vmap), [40, 3]);
    });
}

/// A start with a recorded set: exactly its pages are there before anybody touches them, with the right bytes; touches of them
/// are no faults. The rest comes as ever.
#[test]
fn a_replay_brings_the_recorded_pages_and_no_others() {
    alone("a_replay_brings_the_recorded_pages_and_no_others", || {
        let folder = tempfile::tempdir().unwrap();
        let (image, saved) = (folder.path().join("image"), folder.path().join("image.set"));
        let mut contents = vec![0; 3000 * page_size()];
        fill_marks(0, &mut contents);
        fs::write(&image, contents).unwrap();
        let list = || {
            let mut list = Kiobuf::new();
            list.map_file(&fs::File::open(&image).unwrap(), 0..3000 * page_size() as u64).unwrap();
            list
        };
        let touched = some_pages(3000, 1500, 3);
        {
            let engine = engine_builder().delivery(Delivery::Handler).fault_around_pages(1).build().unwrap();
            let (vmap, region) = recorded(&engine, &list());
            touch_all(&region, touched.iter().copied());
            engine.settle().unwrap();
            vmap.working_set().unwrap().save(&saved).unwrap();
        }
        let set = WorkingSet::load(&saved).unwrap();
        assert_eq!((set.pages(), set.list_pages(), set.is_empty()), (&touched[..], 3000, false));
        for threads in [1, 4] {
            let engine = engine_builder().delivery(Delivery::Handler).fault_around_pages(1).build().unwrap();
            let (vmap, region) = recorded(&engine, &list());
            let options = PopulateOptions::new().threads(threads).step_bytes(100 * page_size());
            let done = region.replay(&set, options).unwrap().wait().unwrap();
            assert_eq!((done.pages_done, done.pages_total, done.pages_failed), (1500, 1500, 0));
            assert_eq!(mapped(&region), 1500);
            touch_all(&region, touched.iter().copied());
            assert_eq!(settled_stats(&engine).faults, 0);
            touch_all(&region, 0..3000);
            assert_eq!(settled_stats(&engine).faults, 1500);
            // What it did without is added for the next time.
            let mut both = set.clone();
            both.include(&vmap.working_set().unwrap()).unwrap();
            assert_eq!((both.pages().len(), &both.pages()[..1500]), (3000, &touched[..]));
            both.include(&set).unwrap();
            assert_eq!(both.pages().len(), 3000);
            // A part of the list gets its part of the set.
            let part = vmap.attach(&AttachOptions::new().pgoff(1000).len_bytes(500 * page_size())).unwrap();
            let wanted = touched.iter().filter(|page| (1000..1500).contains(*page)).count() as u64;
            let done = part.replay(&set, PopulateOptions::new()).unwrap().wait().unwrap();
            assert_eq!((done.pages_done, done.pages_total), (wanted, wanted));
        }
    });
}

/// A set is refused for another list and for an image that was changed, and in no case replayed.
#[test]
fn sets_of_other_images_are_refused() {
    alone("sets_of_other_images_are_refused", || {
        let engine = engine();
        let refused = |list: &Kiobuf, set: &WorkingSet| {
            let region = engine.vmap(list).unwrap().attach(&AttachOptions::new()).unwrap();
            let error = region.replay(set, PopulateOptions::new()).map(drop).unwrap_err();
            assert_eq!((error.errno(), mapped(&region)), (Errno::ESTALE, 0));
            fault_of::<()>(Err(error))
        };
        let set_of = |list: &Kiobuf| {
            let (vmap, region) = recorded(&engine, list);
            touch::read(at(&region, 1)).unwrap();
            engine.settle().unwrap();
            vmap.working_set().unwrap()
        };
        let length = |found, here| WorkingSetFault::OtherLength { found, here };
        let set = set_of(&pages(10));
        assert_eq!(refused(&pages(11), &set), length(10, 11));
        // Of memory nothing is known but how it is put together.
        assert_eq!(refused(&Kiobuf::concat(&[pages(5), pages(5)]).unwrap(), &set), WorkingSetFault::OtherImage);
        let mut zeros = Kiobuf::new();
        zeros.map_zero(10).unwrap();
        assert_eq!(refused(&zeros, &set), WorkingSetFault::OtherImage);
        let mut other = set_of(&pages(11));
        assert_eq!(fault_of(other.include(&set)), length(10, 11));

        // With Delivery::InThread there are no files.
        let engine = engine_builder().delivery(Delivery::Handler).build().unwrap();
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("image");
        let image = |bytes: &[u8]| {
            fs::write(&path, bytes).unwrap();
            let file = fs::File::options().read(true).write(true).open(&path).unwrap();
            let mut list = Kiobuf::new();
            list.map_file(&file, 0..bytes.len() as u64).unwrap();
            (file, list)
        };
        let (file, list) = image(&vec![7; 10 * page_size()]);
        let vmap = engine.vmap_builder(&list).record_working_set().build().unwrap();
        let set = vmap.working_set().unwrap();
        let replay = |list: &Kiobuf| {
            let region = engine.vmap(list).unwrap().attach(&AttachOptions::new()).unwrap();
            region.replay(&set, PopulateOptions::new()).and_then(|replay| replay.wait())
        };
        replay(&list).unwrap();
        file.set_modified(SystemTime::UNIX_EPOCH + Duration::from_secs(1_000_000)).unwrap();
        assert_eq!(fault_of(replay(&list)), WorkingSetFault::OtherImage);
        let (_file, longer) = image(&vec![7; 10 * page_size() + 1]);
        assert_eq!(fault_of(replay(&longer.slice(0..10).unwrap())), WorkingSetFault::OtherImage);

        // Where contents are named, the name decides, and nothing else.
        let named = |list: &Kiobuf, name: &str| engine.vmap_builder(list).identity(name).record_working_set().build();
        let set = named(&pages(10), "version 1").unwrap().working_set().unwrap();
        let replay = |name, list: &Kiobuf| {
            let region = named(list, name).unwrap().attach(&AttachOptions::new()).unwrap();
            region.replay(&set, PopulateOptions::new()).and_then(|replay| replay.wait())
        };
        replay("version 1", &Kiobuf::concat(&[pages(5), pages(5)]).unwrap()).unwrap();
        assert_eq!(fault_of(replay("version 2", &pages(10))), WorkingSetFault::OtherImage);
        // A list that was taken back has no set any more.
        let region = engine.vmap(&list).unwrap().attach(&AttachOptions::new()).unwrap();
        region.vmap().revoke(Revoke::Soft).unwrap();
        assert_eq!(fault_of(region.replay(&set, PopulateOptions::new())), WorkingSetFault::OtherImage);
    });
}

/// A source's word decides whether its image is the same.
#[test]
fn sources_say_whether_they_are_the_same() {
    struct Named(&'static [u8]);
    impl PageSource for Named {
        fn read_at(&self, offset_bytes: u64, buf: &mut [u8]) -> std::io::Result<()> {
            fill_marks(offset_bytes / page_size() as u64, buf);
            Ok(())
        }
        fn identity(&self) -> Option<Vec<u8>> {
            (!self.0.is_empty()).then(|| self.0.to_vec())
        }
    }
    alone("sources_say_whether_they_are_the_same", || {
        needs_sources!();
        let engine = engine_builder().delivery(Delivery::Handler).build().unwrap();
        let list = |name| {
            let mut list = Kiobuf::new();
            list.map_source(Arc::new(Named(name)), 20 * page_size() as u64).unwrap();
            list
        };
        let set = recorded(&engine, &list(b"etag 1")).0.working_set().unwrap();
        for (name, same) in [(&b"etag 1"[..], true), (b"etag 2", false), (b"", false)] {
            let region = engine.vmap(&list(name)).unwrap().attach(&AttachOptions::new()).unwrap();
            assert_eq!(region.replay(&set, PopulateOptions::new()).is_ok(), same, "{name:?}");
        }
    });
}

/// Sources are told what will be read before it is, and not of pages outside the set; a panic of theirs there is counted and
/// stops nothing.
#[test]
fn sources_are_told_ahead() {
    #[derive(Default)]
    struct Log {
        told: Mutex<Vec<u64>>,
        untold: AtomicU64,
        panics: AtomicBool,
    }
    impl PageSource for Log {
        fn read_at(&self, offset_bytes: u64, buf: &mut [u8]) -> std::io::Result<()> {
            let (first, told) = (offset_bytes / page_size() as u64, self.told.lock().unwrap());
            let read = first..first + (buf.len() / page_size()) as u64;
            self.untold.fetch_add(read.filter(|page| !told.contains(page)).count() as u64, Ordering::Relaxed);
            fill_marks(first, buf);
            Ok(())
        }
        fn will_read(&self, range_bytes: std::ops::Range<u64>) {
            let page = page_size() as u64;
            self.told.lock().unwrap().extend(range_bytes.start / page..range_bytes.end / page);
            assert!(!self.panics.load(Ordering::Relaxed), "asked to");
        }
    }
    alone("sources_are_told_ahead", || {
        needs_sources!();
        let engine = engine_builder().delivery(Delivery::Handler).fault_around_pages(1).build().unwrap();
        let touched = some_pages(2000, 700, 4);
        let mut set = None;
        for panics in [false, true] {
            let source = Arc::new(Log::default());
            source.panics.store(panics, Ordering::Relaxed);
            let mut list = Kiobuf::new();
            list.map_source(Arc::clone(&source) as _, 2000 * page_size() as u64).unwrap();
            let (vmap, region) = recorded(&engine, &list);
            let set = set.get_or_insert_with(|| {
                touch_all(&region, touched.iter().copied());
                engine.settle().unwrap();
                source.untold.store(0, Ordering::Relaxed);
                vmap.working_set().unwrap()
            });
            let again = engine.vmap(&list).unwrap().attach(&AttachOptions::new()).unwrap();
            let options = PopulateOptions::new().threads(1).step_bytes(50 * page_size());
            assert_eq!(again.replay(set, options).unwrap().wait().unwrap().pages_done, 700);
            assert_eq!(source.untold.load(Ordering::Relaxed), 0);
            let mut told = source.told.lock().unwrap().clone();
            told.sort_unstable();
            let mut expected = touched.clone();
            expected.sort_unstable();
            assert_eq!(told, expected);
        }
        assert!(settled_stats(&engine).panics > 0);
    });
}

/// A replay makes bounded steps, in which a cancel is noticed, and faults are answered while one waits for a slow source.
#[test]
fn a_replay_is_cancelled_between_steps_and_holds_no_fault_up() {
    alone("a_replay_is_cancelled_between_steps_and_holds_no_fault_up", || {
        needs_sources!();
        let engine = engine_builder().delivery(Delivery::Handler).fault_around_pages(1).build().unwrap();
        let gate = GatedSource::new();
        gate.open();
        let list = Kiobuf::concat(&[gate.list(1000), pages(100)]).unwrap();
        let (vmap, region) = recorded(&engine, &list);
        touch_all(&region, (0..1000).step_by(10));
        engine.settle().unwrap();
        let set = vmap.working_set().unwrap();
        gate.shut();
        let before = gate.calls();
        let again = engine.vmap(&list).unwrap().attach(&AttachOptions::new()).unwrap();
        let replay = again.replay(&set, PopulateOptions::new().threads(3).step_bytes(10 * page_size())).unwrap();
        gate.wait_for_held(3);
        assert_eq!(touch::read(at(&again, 1050)), Ok(mark(50)));
        assert_eq!((replay.progress().pages_done, replay.is_finished()), (0, false));
        replay.cancel();
        gate.open();
        let done = replay.wait().unwrap();
        assert!(done.pages_done <= 3 && done.pages_total == 100, "{done:?}");
        assert_eq!(gate.calls() - before, 3);
        // And a shutdown ends it.
        gate.shut();
        let replay = again.replay(&set, PopulateOptions::new()).unwrap();
        // Unless said otherwise, four threads wait for pages.
        gate.wait_for_held(4);
        std::thread::scope(|scope| {
            let shutdown = scope.spawn(|| engine.shutdown(Shutdown::Poison));
            eventually("the shutdown begins", || again.populate(0..1).is_err_and(|e| e.errno() == Errno::ESHUTDOWN));
            gate.open();
            shutdown.join().unwrap().unwrap();
        });
        assert_eq!(replay.wait().unwrap_err().errno(), Errno::ESHUTDOWN);
    });
}

/// Pages that can't be had any more are counted, the others are there, and a touch of them asks the list again.
#[test]
fn a_replay_of_what_can_not_be_had_refuses_nothing_for_good() {
    alone("a_replay_of_what_can_not_be_had_refuses_nothing_for_good", || {
        needs_sources!();
        let engine = engine_builder().delivery(Delivery::Handler).fault_around_pages(1).build().unwrap();
        let failing = Arc::new(AtomicBool::new(false));
        let fails = Arc::clone(&failing);
        let list = support::source(100, move |first, len| {
            let hit = (first..first + len as u64).contains(&30) && fails.load(Ordering::SeqCst);
            if hit { Err(std::io::ErrorKind::InvalidInput.into()) } else { Ok(()) }
        });
        let (vmap, region) = recorded(&engine, &list);
        touch_all(&region, 25..35);
        engine.settle().unwrap();
        let set = vmap.working_set().unwrap();
        failing.store(true, Ordering::SeqCst);
        let again = engine.vmap(&list).unwrap().attach(&AttachOptions::new()).unwrap();
        let done = again.replay(&set, PopulateOptions::new()).unwrap().wait().unwrap();
        assert_eq!((done.pages_done, done.pages_failed, mapped(&again)), (10, 1, 9));
        failing.store(false, Ordering::SeqCst);
        touch_all(&again, 25..35);
    });
}

/// A recorded set is refused where it can't be kept.
#[test]
fn what_can_not_be_recorded_is_refused() {
    alone("what_can_not_be_recorded_is_refused", || {
        let engine = engine();
        let refused = engine.vmap_builder(&pages(10)).expandable().record_working_set().build().unwrap_err();
        assert!(matches!(refused, Error::Invalid { value: 10, .. }), "{refused}");
        let mut long = Kiobuf::new();
        long.map_zero((1 << 30) + 1).unwrap();
        let refused = engine.vmap_builder(&long).record_working_set().build().unwrap_err();
        assert!(matches!(refused, Error::Invalid { value, .. } if value == (1 << 30) + 1), "{refused}");
        let (vmap, _region) = support::attached(&engine, &pages(10));
        assert!(matches!(vmap.working_set(), Err(Error::Invalid { value, .. }) if value == vmap.id()));
        let copied = engine.vmap_builder(&pages(10)).backing(Backing::Copied).record_working_set().build().unwrap();
        let set = copied.working_set().unwrap();
        let region = copied.attach(&AttachOptions::new()).unwrap();
        let options = PopulateOptions::new().threads(17);
        assert!(matches!(region.replay(&set, options), Err(Error::Invalid { value: 17, .. })));
        assert_eq!(region.replay(&set, PopulateOptions::new()).unwrap().wait().unwrap().pages_total, 0);
        reap_ok(child(|| {
            let error = region.replay(&set, PopulateOptions::new()).map(drop).unwrap_err();
            assert_eq!(error.errno(), Errno::EPERM);
        }));
    });
}

fn names(folder: &Path) -> Vec<String> {
    let mut names: Vec<_> =
        fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

/// A file that is damaged, cut short, something else, or not there is a typed error; so is a place where none can be saved, which
/// leaves nothing behind and what was there as it was.
#[test]
fn files_of_sets_are_exchanged_whole_and_damage_is_told() {
    alone("files_of_sets_are_exchanged_whole_and_damage_is_told", || {
        let engine = engine();
        let (vmap, region) = recorded(&engine, &pages(100));
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("set");
        touch_all(&region, [5, 90]);
        engine.settle().unwrap();
        let first = vmap.working_set().unwrap();
        first.save(&path).unwrap();
        touch_all(&region, [3]);
        engine.settle().unwrap();
        let second = vmap.working_set().unwrap();
        second.save(&path).unwrap();
        assert_eq!(WorkingSet::load(&path).unwrap(), second);
        assert_eq!(names(folder.path()), ["set"]);

        let good = fs::read(&path).unwrap();
        for (bytes, fault) in [
            (&good[..good.len() - 1], WorkingSetFault::Damaged),
            (&good[..40], WorkingSetFault::Damaged),
            (b"", WorkingSetFault::NotOne),
            (b"#!/bin/sh\nexit 0\n", WorkingSetFault::NotOne),
        ] {
            fs::write(&path, bytes).unwrap();
            assert_eq!(fault_of(WorkingSet::load(&path)), fault);
        }
        let long = fs::File::create(&path).unwrap();
        long.set_len(1 << 40).unwrap();
        assert_eq!(fault_of(WorkingSet::load(&path)), WorkingSetFault::NotOne);
        std::os::unix::fs::FileExt::write_all_at(&long, &good, 0).unwrap();
        assert!(
            matches!(fault_of(WorkingSet::load(&path)), WorkingSetFault::TooLong { bytes, .. } if bytes == 1 << 40)
        );
        let missing = WorkingSet::load(folder.path().join("none")).unwrap_err();
        assert_eq!(missing.errno(), Errno::ENOENT);
        let pipe = folder.path().join("pipe");
        nix::unistd::mkfifo(&pipe, nix::sys::stat::Mode::S_IRWXU).unwrap();
        assert_eq!(fault_of(WorkingSet::load(&pipe)), WorkingSetFault::NotOne);
        assert_eq!(fault_of(WorkingSet::load(folder.path())), WorkingSetFault::NotOne);

        // A folder can't be exchanged for a file.
        fs::remove_file(&pipe).unwrap();
        let taken = folder.path().join("taken");
        fs::create_dir(&taken).unwrap();
        first.save(&taken).unwrap_err();
        first.save("/").unwrap_err();
        assert_eq!(first.save(folder.path().join("none/set")).unwrap_err().errno(), Errno::ENOENT);
        assert_eq!(names(folder.path()), ["set", "taken"]);
        // Where nothing may be made, what was there stays. (Root may do anything.)
        let kept = taken.join("set");
        first.save(&kept).unwrap();
        fs::set_permissions(&taken, fs::Permissions::from_mode(0o500)).unwrap();
        if !nix::unistd::geteuid().is_root() {
            assert_eq!(second.save(&kept).unwrap_err().errno(), Errno::EACCES);
        }
        fs::set_permissions(&taken, fs::Permissions::from_mode(0o700)).unwrap();
        // A disk that is full, as a limit: what was there stays, and nothing else.
        use nix::sys::resource::{Resource, getrlimit, setrlimit};
        use nix::sys::signal::{SigHandler, Signal, signal};
        // SAFETY: ignoring a signal runs no code.
        unsafe { signal(Signal::SIGXFSZ, SigHandler::SigIgn) }.unwrap();
        let (soft, hard) = getrlimit(Resource::RLIMIT_FSIZE).unwrap();
        setrlimit(Resource::RLIMIT_FSIZE, 60, hard).unwrap();
        assert_eq!(second.save(&kept).unwrap_err().errno(), Errno::EFBIG);
        setrlimit(Resource::RLIMIT_FSIZE, soft, hard).unwrap();
        assert_eq!(WorkingSet::load(&kept).unwrap(), first);
        assert_eq!(names(&taken), ["set"]);
    });
}
