//! The registry as a whole: what it lists is what there is.

mod support;

use kiomap::{AttachOptions, Error, page_size};
use support::scene::{GatedSource, Told, at, child, settled};
use support::truth::{assert_count, assert_nobody_waits, assert_truth};
use support::{alone, engine_builder, eventually, mark, pages, reap_ok, touch};

#[test]
fn a_snapshot_lists_vmaps_processes_and_areas_as_the_kernel_has_them() {
    alone("a_snapshot_lists_vmaps_processes_and_areas_as_the_kernel_has_them", || {
        let engine = engine_builder().fault_around_pages(1).build().unwrap();
        assert_truth(&engine);
        let (wide, small) = (engine.vmap(&pages(20)).unwrap(), engine.vmap(&pages(3)).unwrap());
        let whole = wide.attach(&AttachOptions::new()).unwrap();
        let part = wide.attach(&AttachOptions::new().pgoff(5).len_bytes(7 * page_size()).read_only()).unwrap();
        let other = small.attach(&AttachOptions::new().inherit(false)).unwrap();
        assert_eq!(touch::read(at(&whole, 3)), Ok(mark(3)));

        let snapshot = engine.snapshot().unwrap();
        let [first, second] = &snapshot.vmaps[..] else { panic!("{snapshot}") };
        assert_eq!((first.id, first.nr_pages, first.refcount), (wide.id(), 20, 2));
        assert_eq!((second.id, second.nr_pages, second.refcount), (small.id(), 3, 1));
        assert_eq!((first.resident_bytes, second.resident_bytes), (page_size() as u64, 0));
        let [own] = &snapshot.spaces[..] else { panic!("{snapshot}") };
        assert_eq!(own.pid, std::process::id() as i32);
        for region in [&whole, &part, &other] {
            let area = own.areas.iter().find(|area| area.region == region.id()).unwrap();
            assert_eq!((area.start, area.end - area.start), (region.as_ptr() as usize, region.len_bytes()));
            assert_eq!((area.pgoff, area.vmap), (region.pgoff(), region.vmap().id()));
            assert_eq!(area.writable, region.is_writable());
        }
        let text = snapshot.to_string();
        assert!(text.contains("rw vmap 1 pages 0..20"), "{text}");
        assert!(text.contains("r- vmap 1 pages 5..12"), "{text}");
        assert_count(&engine, &wide, 2);

        let (inside, go) = (Told::new(), Told::new());
        let forked = child(|| {
            assert!(matches!(engine.snapshot(), Err(Error::NotOwner { .. })));
            inside.tell(1);
            go.wait_for(1);
        });
        inside.wait_for(1);
        // The region that is not inherited is no area there.
        assert_count(&engine, &wide, 4);
        assert_count(&engine, &small, 1);
        let snapshot = engine.snapshot().unwrap();
        assert_eq!(snapshot.spaces[1].pid, forked.as_raw());
        assert_eq!(snapshot.spaces[1].areas.len(), 2);
        go.tell(1);
        reap_ok(forked);
        settled(&engine, &wide, 2);
        drop((whole, part, other));
        assert_count(&engine, &wide, 0);
        assert_nobody_waits(&engine);
    });
}

/// T110: a thread that waits for its page is counted by the kernel, and the snapshot tells.
#[test]
fn a_snapshot_tells_who_waits_for_a_page() {
    needs_sources!();
    alone("a_snapshot_tells_who_waits_for_a_page", || {
        let engine = engine_builder().build().unwrap();
        let source = GatedSource::new();
        let vmap = engine.vmap(&source.list(4)).unwrap();
        let region = vmap.attach(&AttachOptions::new()).unwrap();
        assert_nobody_waits(&engine);
        std::thread::scope(|scope| {
            let waiter = scope.spawn(|| touch::read(at(&region, 2)));
            source.wait_for_held(1);
            let snapshot = engine.snapshot().unwrap();
            assert_eq!((snapshot.spaces[0].pending, snapshot.spaces[0].total), (0, 1), "{snapshot}");
            source.open();
            assert_eq!(waiter.join().unwrap(), Ok(mark(2)));
        });
        eventually("the waiter is gone", || engine.snapshot().unwrap().spaces[0].total == 0);
    });
}

/// After a shutdown the areas that are guarded are still listed; when none is left, none is.
#[test]
fn a_snapshot_after_a_shutdown_lists_what_is_left() {
    alone("a_snapshot_after_a_shutdown_lists_what_is_left", || {
        let engine = engine_builder().build().unwrap();
        let vmap = engine.vmap(&pages(2)).unwrap();
        let region = vmap.attach(&AttachOptions::new()).unwrap();
        engine.shutdown(kiomap::Shutdown::Poison).unwrap();
        let snapshot = engine.snapshot().unwrap();
        assert_eq!((snapshot.spaces.len(), snapshot.spaces[0].areas.len(), snapshot.vmaps[0].refcount), (1, 1, 1));
        drop(region);
        eventually("the guard has ended", || engine.snapshot().unwrap().spaces.is_empty());
        assert_eq!(engine.snapshot().unwrap().vmaps[0].refcount, 0);
    });
}
