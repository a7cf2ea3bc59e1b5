//! Random lists against a naive model: a page is its bytes, or nothing.

use proptest::prelude::*;

use super::*;

/// A part of a list, small enough to model page by page. Lengths are in bytes but for `Zero` and `Hole`.
#[derive(Debug, Clone)]
pub(super) enum Part {
    Slice { head: usize, len: usize },
    Bytes { len: usize },
    Arena { nr_pages: usize },
    File { at: usize, len: usize },
    Mmap { at: usize, len: usize },
    Source { len: usize },
    Zero { nr_pages: usize },
    Hole { nr_pages: usize },
}

pub(super) type Model = Vec<Option<Vec<u8>>>;

pub(super) fn part() -> impl Strategy<Value = Part> {
    let page = page_size();
    // Lengths at and around page boundaries come up as often as those in between.
    let len =
        prop_oneof![1..4 * page, (1..4usize).prop_map(move |n| n * page), (1..4usize).prop_map(move |n| n * page + 1)];
    let head = prop_oneof![Just(0), Just(page - 1), 0..page];
    prop_oneof![
        (head.clone(), len.clone()).prop_map(|(head, len)| Part::Slice { head, len }),
        len.clone().prop_map(|len| Part::Bytes { len }),
        (1..4usize).prop_map(|nr_pages| Part::Arena { nr_pages }),
        (0..3 * page, len.clone()).prop_map(|(at, len)| Part::File { at, len }),
        (head, len.clone()).prop_map(|(at, len)| Part::Mmap { at, len }),
        len.prop_map(|len| Part::Source { len }),
        (1..4usize).prop_map(|nr_pages| Part::Zero { nr_pages }),
        (1..4usize).prop_map(|nr_pages| Part::Hole { nr_pages }),
    ]
}

fn pages(bytes: &[u8], head: usize) -> Model {
    padded(bytes, head).chunks(page_size()).map(|page| Some(page.to_vec())).collect()
}

/// Builds a part and its model.
pub(super) fn build(part: &Part, seed: u64) -> (Kiobuf, Model) {
    let page = page_size();
    let bytes = pattern(8 * page, seed);
    match *part {
        Part::Slice { head, len } => (window(&bytes[..len], head), pages(&bytes[..len], head)),
        Part::Bytes { len } => (mapped(|list| list.map_bytes(bytes[..len].to_vec())), pages(&bytes[..len], 0)),
        Part::Arena { nr_pages } => {
            let mut arena = Arena::new(nr_pages).unwrap();
            arena.copy_from_slice(&bytes[..nr_pages * page]);
            (mapped(|list| list.map_kernel(arena)), pages(&bytes[..nr_pages * page], 0))
        }
        Part::File { at, len } => {
            let range = at as u64..(at + len) as u64;
            (mapped(|list| list.map_file(&file_of(&bytes), range)), pages(&bytes[at..at + len], 0))
        }
        Part::Mmap { at, len } => {
            // SAFETY: nobody writes to the file.
            let map = unsafe { memmap2::MmapOptions::new().offset(at as u64).len(len).map(&file_of(&bytes)) }.unwrap();
            (mapped(|list| list.map_mmap(map)), pages(&bytes[at..at + len], at % page))
        }
        Part::Source { len } => {
            let source = Arc::new(Bytes(bytes[..len].to_vec()));
            (mapped(|list| list.map_source(source, len as u64)), pages(&bytes[..len], 0))
        }
        Part::Zero { nr_pages } => (mapped(|list| list.map_zero(nr_pages as u64)), vec![Some(vec![0; page]); nr_pages]),
        Part::Hole { nr_pages } => (mapped(|list| list.map_hole(nr_pages as u64)), vec![None; nr_pages]),
    }
}

/// Checks a whole run of pages at once, as fault-around uses it.
pub(super) fn check_run(kiobuf: &Kiobuf, pgoff: u64, model: &Model) {
    let expected = |run: &Range<u64>| -> Vec<u8> {
        assert!(run.contains(&pgoff) && run.end <= model.len() as u64);
        (run.start..run.end).flat_map(|at| model[at as usize].clone().expect("a run has no hole")).collect()
    };
    match kiobuf.nopage(pgoff) {
        Nopage::Direct { src, run } => {
            let expected = expected(&run);
            // SAFETY: `Direct` promises that all pages of the run lie at `src`, and the list is borrowed.
            assert!(unsafe { std::slice::from_raw_parts(src, expected.len()) } == expected);
        }
        Nopage::Read { run, may_block } => {
            let expected = expected(&run);
            let mut buf = vec![0xaa; expected.len()];
            match kiobuf.try_read_pages(run.start, &mut buf) {
                TryRead::Done => assert!(buf == expected),
                answer => assert!(may_block && answer == TryRead::WouldBlock, "{answer:?}"),
            }
            buf.fill(0xaa);
            kiobuf.read_pages(run.start, &mut buf).unwrap();
            assert!(buf == expected);
        }
        Nopage::Zero { run } => assert!(expected(&run).iter().all(|&byte| byte == 0)),
        Nopage::Sigbus(NoPageWhy::Hole) => assert_eq!(model[pgoff as usize], None),
        Nopage::Sigbus(NoPageWhy::PastEnd) => panic!("page {pgoff} is in the list"),
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 200, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn every_page_is_what_the_model_says(parts in proptest::collection::vec(part(), 0..7)) {
        let (lists, models): (Vec<_>, Vec<_>) = parts.iter().zip(1..).map(|(part, seed)| build(part, seed)).unzip();
        let kiobuf = Kiobuf::concat(&lists).unwrap();
        let mut expanded = Kiobuf::new();
        for list in &lists {
            expanded.expand(list).unwrap();
        }
        prop_assert_eq!(format!("{kiobuf:?}"), format!("{expanded:?}"));
        let model: Model = models.concat();
        prop_assert_eq!(kiobuf.nr_pages(), model.len() as u64);
        for (pgoff, expected) in (0..).zip(&model) {
            prop_assert!(page(&kiobuf, pgoff) == *expected, "page {}", pgoff);
            check_run(&kiobuf, pgoff, &model);
        }
        for past in [model.len() as u64, model.len() as u64 + 1, u64::MAX] {
            prop_assert_eq!(kiobuf.nopage(past), Nopage::Sigbus(NoPageWhy::PastEnd));
        }
    }
}
