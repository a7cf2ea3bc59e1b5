//! Parts of lists, and lists laid on one another.

use std::io::Seek;
use std::os::unix::fs::FileExt;

use proptest::prelude::*;

use super::model::{Model, Part, build, check_run, part};
use super::*;

fn list_of(parts: &[Part], seed: u64) -> (Kiobuf, Model) {
    let (lists, models): (Vec<_>, Vec<_>) = parts.iter().zip(seed..).map(|(part, seed)| build(part, seed)).unzip();
    (Kiobuf::concat(&lists).unwrap(), models.concat())
}

/// Checks every page of a list against a model, by single pages and by the runs that fault-around takes.
fn check(kiobuf: &Kiobuf, model: &Model) {
    assert_eq!(kiobuf.nr_pages(), model.len() as u64);
    for (pgoff, expected) in (0..).zip(model) {
        assert!(page(kiobuf, pgoff) == *expected, "page {pgoff}");
        check_run(kiobuf, pgoff, model);
    }
    assert_eq!(kiobuf.nopage(model.len() as u64), Nopage::Sigbus(NoPageWhy::PastEnd));
    let holes = (0..).zip(model).filter(|(_, page)| page.is_none()).map(|(pgoff, _)| pgoff);
    assert!(holes.into_iter().all(|pgoff: u64| kiobuf.nopage(pgoff) == Nopage::Sigbus(NoPageWhy::Hole)));
}

/// What layers show, page by page: the first that has one.
fn laid(models: &[Model]) -> Model {
    let nr_pages = models.iter().map(Vec::len).max().unwrap_or(0);
    let shown = |pgoff: usize| models.iter().find_map(|model| model.get(pgoff).cloned().flatten());
    (0..nr_pages).map(shown).collect()
}

fn layers() -> impl Strategy<Value = Vec<Vec<Part>>> {
    // Holes come up often, or one layer would hide all others.
    let sparse = prop_oneof![part(), (1..6usize).prop_map(|nr_pages| Part::Hole { nr_pages })];
    proptest::collection::vec(proptest::collection::vec(sparse, 0..7), 0..5)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 200, failure_persistence: None, ..ProptestConfig::default() })]

    /// Each page of layers is that of the first layer that has one; so it is in any part of them, and in parts of parts.
    #[test]
    fn layers_and_parts_are_what_the_model_says(
        stack in layers(), cuts in proptest::collection::vec((0u64..1000, 0u64..1000), 3),
    ) {
        let (lists, models): (Vec<_>, Vec<_>) =
            stack.iter().zip(1..).map(|(parts, n)| list_of(parts, 100 * n)).unzip();
        let (mut kiobuf, mut model) = (Kiobuf::layered(&lists), laid(&models));
        check(&kiobuf, &model);
        let extents: usize = lists.iter().map(|list| list.extents().count()).sum();
        prop_assert!(kiobuf.extents().count() <= 2 * extents);
        for (start, end) in cuts {
            let end = end % (model.len() as u64 + 1);
            let start = start % (end + 1);
            kiobuf = kiobuf.slice(start..end).unwrap();
            model = model[start as usize..end as usize].to_vec();
            check(&kiobuf, &model);
        }
        // A stack of two and its base is a stack of three.
        let by_two = lists.iter().rev().fold(Kiobuf::new(), |below, list| Kiobuf::layered(&[list.clone(), below]));
        check(&by_two, &laid(&models));
    }
}

/// A range outside the list is refused, and says its end.
#[test]
fn parts_outside_the_list_are_refused() {
    let kiobuf = window(&pattern(3 * page_size(), 50), 0);
    for (start, end) in [(0, 4), (4, 4), (2, 1), (0, u64::MAX), (u64::MAX, u64::MAX)] {
        let refused = kiobuf.slice(Range { start, end }).unwrap_err();
        assert!(matches!(refused, Error::Invalid { value, .. } if value == end), "{refused}");
    }
    assert_eq!(kiobuf.slice(3..3).unwrap().nr_pages(), 0);
    assert_eq!(kiobuf.slice(0..3).unwrap().extents().count(), 1);
}

/// T15 for layers: a page that the upper list holds data for in a part is its page; what lies below is not mixed in.
#[test]
fn slack_of_an_upper_page_hides_what_is_below() {
    let page_len = page_size();
    let (above, below) = (pattern(100, 51), pattern(2 * page_len, 52));
    let upper = mapped(|list| list.map_bytes(above.clone()));
    let lower = window(&below, 0);
    let expected = [padded(&above, 0), below[page_len..].to_vec()].concat();
    assert_eq!(contents(&Kiobuf::layered(&[upper, lower])), expected);
}

/// Deep stacks cost what their extents cost: a thousand differences of a thousand runs on a terabyte. Holes of a layer show the
/// layer below, zeros don't.
#[test]
fn a_thousand_layers_are_one_short_list() {
    let nr_pages = 1u64 << 28;
    let base = mapped(|list| list.map_zero(nr_pages));
    let bytes = pattern(page_size(), 53);
    let one = window(&bytes, 0);
    let layers: Vec<Kiobuf> = (0..1000u64)
        .map(|layer| {
            let mut list = Kiobuf::new();
            for run in 0..100 {
                // Each layer has its own pages, but for the first of each run, which all have.
                let before = if run == 0 { 0 } else { 10_000 - layer - 2 };
                if before > 0 {
                    list.expand(&mapped(|hole| hole.map_hole(before))).unwrap();
                }
                list.expand(&one).unwrap();
                if layer > 0 {
                    list.expand(&mapped(|hole| hole.map_hole(layer))).unwrap();
                }
                list.expand(&one).unwrap();
            }
            list
        })
        .chain([base])
        .collect();
    let kiobuf = Kiobuf::layered(&layers);
    assert_eq!(kiobuf.nr_pages(), nr_pages);
    assert!(kiobuf.extents().count() <= 2 * (1000 * 200 + 1));
    for (pgoff, filled) in [(0, true), (1, true), (1000, true), (1001, false), (10_000, true), (990_500, true)] {
        let expected = if filled { bytes.clone() } else { vec![0; page_size()] };
        assert!(page(&kiobuf, pgoff).unwrap() == expected, "page {pgoff}");
    }
    assert_eq!(Kiobuf::layered(&[]).nr_pages(), 0);
}

/// Parts of one memfd that follow on are one run of it, and can be shown themselves; a hole filled from elsewhere ends that.
#[test]
fn parts_of_a_memfd_are_a_run_of_it_again() {
    let mut arena = Arena::shared(8).unwrap();
    arena.copy_from_slice(&pattern(8 * page_size(), 54));
    let whole = mapped(|list| list.map_kernel(arena));
    let tail = whole.slice(3..8).unwrap();
    assert_eq!(tail.memfd_run().unwrap().offset, 3 * page_size() as u64);
    let again = Kiobuf::concat(&[whole.slice(0..3).unwrap(), tail.clone()]).unwrap();
    assert_eq!(again.memfd_run().unwrap().offset, 0);
    assert_eq!(contents(&again), contents(&whole));
    assert!(whole.slice(0..7).unwrap().memfd_run().is_err(), "what lies behind it would be shown");
    let below = Kiobuf::layered(&[mapped(|list| list.map_hole(8)), whole.clone()]);
    assert_eq!(below.memfd_run().unwrap().offset, 0);
    let covered = Kiobuf::layered(&[window(&pattern(page_size(), 55), 0), whole]);
    assert!(covered.memfd_run().is_err());
}

/// T30: a part keeps what it borrows, and an arena that is borrowed can't be read into.
#[test]
fn a_part_keeps_what_it_borrows() {
    let drops = Arc::new(AtomicUsize::new(0));
    let kiobuf = mapped(|list| list.map_slice(Counted(pattern(3 * page_size(), 56), drops.clone())));
    let part = Kiobuf::layered(&[mapped(|list| list.map_hole(4)), kiobuf.slice(1..3).unwrap()]);
    drop(kiobuf);
    assert_eq!(drops.load(Ordering::SeqCst), 0);
    assert!(page(&part, 0).is_some());
    drop(part);
    assert_eq!(drops.load(Ordering::SeqCst), 1);

    let mut arena = mapped(|list| list.map_kernel(Arena::new(4).unwrap()));
    let part = arena.slice(2..4).unwrap();
    let file = file_of(&pattern(4 * page_size(), 57));
    assert!(matches!(arena.read_from(&file, 0), Err(Error::Shared)));
    assert!(contents(&part).iter().all(|&byte| byte == 0));
    drop(part);
    arena.read_from(&file, 0).unwrap();
}

/// A difference's holes show what is below; a page that has any data does not. The file's position stays.
#[test]
fn holes_of_a_difference_are_holes_of_the_list() {
    let page = page_size() as u64;
    // tmpfs keeps holes page by page.
    let memfd = nix::sys::memfd::memfd_create("sparse", nix::sys::memfd::MFdFlags::MFD_CLOEXEC).unwrap();
    let mut file = File::from(memfd);
    file.set_len(25 * page).unwrap();
    let bytes = pattern(4 * page_size(), 58);
    file.write_all_at(&bytes[..2 * page_size()], 3 * page).unwrap();
    file.write_all_at(&bytes[..10], 9 * page + 5).unwrap();
    file.write_all_at(&bytes[..100], 20 * page).unwrap();
    file.seek(std::io::SeekFrom::Start(77)).unwrap();
    let list = mapped(|list| list.map_diff_file(&file));
    assert_eq!(file.stream_position().unwrap(), 77);
    let base = pattern(30 * page_size(), 59);
    let mut expected = base.clone();
    expected[3 * page_size()..5 * page_size()].copy_from_slice(&bytes[..2 * page_size()]);
    expected[9 * page_size()..10 * page_size()].copy_from_slice(&padded(&bytes[..10], 5));
    expected[20 * page_size()..21 * page_size()].copy_from_slice(&padded(&bytes[..100], 0));
    assert_eq!(list.extents().count(), 7);
    assert!(contents(&Kiobuf::layered(&[list, window(&base, 0)])) == expected);

    file.set_len(0).unwrap();
    let mut refused = Kiobuf::new();
    assert!(matches!(refused.map_diff_file(&file), Err(Error::Invalid { value: 0, .. })));
    file.set_len(7 * page + 1).unwrap();
    refused.map_diff_file(&file).unwrap();
    assert_eq!((refused.nr_pages(), refused.length()), (8, 0));
    assert!(matches!(refused.map_diff_file(&file), Err(Error::AlreadyMapped { nr_pages: 8 })));
}
