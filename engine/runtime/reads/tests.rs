use std::time::Duration;

use super::*;
use crate::vmap::failure::FailureCause;

const LIMITS: Limits = Limits { of_medium: 2, slow: 3, quick: 1 };

fn at(ms: u64) -> Moment {
    Moment::UNKNOWN.after(Duration::from_millis(ms))
}

fn wanted(pages: Range<u64>) -> Wanted {
    Wanted {
        vmap: 1,
        generation: 0,
        is_unit: pages.end - pages.start == 1,
        pages,
        run: 0..1000,
        huge: None,
        medium: 7,
        is_quick: false,
        alone: false,
        policy: FailurePolicy::default().deadline(Duration::from_millis(1000)),
        since: at(0),
    }
}

fn waiter(page: usize) -> Waiter {
    let fault = Fault {
        space: 0,
        addr: page * page_size(),
        tid: 0,
        write: false,
        minor: false,
        since: at(0),
        retries: 0,
        starved: 0,
        alone: false,
        failed: None,
    };
    Waiter::Fault(fault)
}

fn ask(reads: &mut Reads, wanted: Wanted) -> Asked {
    let page = wanted.pages.start as usize;
    reads.ask(wanted, waiter(page)).ok().unwrap()
}

/// Has workers make what they may; tells the pages.
fn make(reads: &mut Reads) -> Vec<(u64, Range<u64>)> {
    let mut made = Vec::new();
    while let Some(index) = reads.next_queued(0, LIMITS) {
        reads.made(index);
        made.push((reads.at(index).id, reads.at(index).wanted.pages.clone()));
    }
    made
}

fn waiting(reads: &mut Reads, id: u64) -> usize {
    std::iter::from_fn(|| reads.next_waiter(id)).count()
}

fn error() -> Outcome {
    Outcome::Failed(Why::new(FailureCause::Panicked, "panicked"))
}

#[test]
fn a_page_is_read_once_for_all_who_wait() {
    let mut reads = Reads::new();
    assert_eq!(ask(&mut reads, wanted(4..8)), Asked::New);
    let id = reads.covering(1, 6).unwrap();
    assert_eq!((reads.covering(1, 8), reads.covering(2, 6)), (None, None));
    // The same fault again is no other.
    for page in [4, 6, 6] {
        assert!(reads.join(id, waiter(page)).is_ok());
    }
    assert_eq!(make(&mut reads), [(id, 4..8)]);
    assert!(reads.join(id, waiter(7)).is_ok());
    let ended = reads.finished(id, Outcome::Installed { pages: 4 }, at(1)).unwrap();
    assert!(matches!(ended.how, How::Installed));
    assert_eq!(waiting(&mut reads, id), 3);
    assert_eq!(reads.nr_made(), 0);
}

#[test]
fn neighbours_that_wait_are_read_together() {
    let mut reads = Reads::new();
    assert_eq!(ask(&mut reads, wanted(10..11)), Asked::New);
    assert_eq!(ask(&mut reads, wanted(11..12)), Asked::Merged);
    assert_eq!(ask(&mut reads, wanted(9..10)), Asked::Merged);
    // Of another source, of another list, not next to it, in another extent, or one that failed with its neighbours.
    assert_eq!(ask(&mut reads, Wanted { medium: 8, ..wanted(12..13) }), Asked::New);
    assert_eq!(ask(&mut reads, Wanted { generation: 1, ..wanted(12..13) }), Asked::New);
    assert_eq!(ask(&mut reads, wanted(14..15)), Asked::New);
    assert_eq!(ask(&mut reads, Wanted { run: 12..20, ..wanted(12..13) }), Asked::New);
    assert_eq!(ask(&mut reads, Wanted { alone: true, ..wanted(8..9) }), Asked::New);
    assert_eq!(reads.gap(1, 0..100, 13), 13..14);
    let made = make(&mut reads);
    assert_eq!(made[0].1, 9..12);
    // One that is being made does not grow.
    assert_eq!(ask(&mut reads, Wanted { vmap: 1, medium: 7, ..wanted(15..16) }), Asked::Merged);
}

#[test]
fn a_read_that_has_waited_for_long_takes_no_neighbours() {
    let mut reads = Reads::new();
    ask(&mut reads, Wanted { since: at(100), ..wanted(10..11) });
    // The deadline is a second.
    assert_eq!(ask(&mut reads, Wanted { since: at(599), ..wanted(11..12) }), Asked::Merged);
    assert_eq!(ask(&mut reads, Wanted { since: at(600), ..wanted(12..13) }), Asked::New);
    // One that was put off has come before the neighbour that waits.
    assert_eq!(ask(&mut reads, Wanted { since: at(99), ..wanted(9..10) }), Asked::New);
}

#[test]
fn a_merged_read_has_an_end() {
    let mut reads = Reads::new();
    let most = (MERGED_BYTES / page_size()) as u64;
    for page in 0..most {
        ask(&mut reads, wanted(page..page + 1));
    }
    assert_eq!(ask(&mut reads, wanted(most..most + 1)), Asked::New);
}

#[test]
fn one_medium_has_its_share_and_leaves_the_others_theirs() {
    let mut reads = Reads::new();
    for page in 0..5 {
        ask(&mut reads, wanted(10 * page..10 * page + 1));
    }
    assert_eq!(make(&mut reads).len(), LIMITS.of_medium);
    ask(&mut reads, Wanted { medium: 8, ..wanted(100..101) });
    ask(&mut reads, Wanted { medium: 9, ..wanted(200..201) });
    assert_eq!(make(&mut reads).len(), 1, "no more than {} that may wait", LIMITS.slow);
    for page in [300, 310] {
        ask(&mut reads, Wanted { medium: 10, is_quick: true, ..wanted(page..page + 1) });
    }
    assert_eq!(make(&mut reads).len(), LIMITS.quick);
}

#[test]
fn what_nobody_waits_for_is_not_read() {
    let mut reads = Reads::new();
    ask(&mut reads, wanted(1..2));
    ask(&mut reads, wanted(5..6));
    ask(&mut reads, wanted(6..7));
    let is = |page: usize| move |fault: &Fault| fault.addr == page * page_size();
    assert_eq!(reads.forget(is(5)), 0, "page 6 is still waited for");
    assert_eq!(reads.forget(is(6)), 1);
    assert_eq!(make(&mut reads).len(), 1);
    // It is too late for this one, whose result is nobody's.
    assert_eq!(reads.forget(is(1)), 0);
    let id = reads.covering(1, 1).unwrap();
    assert!(reads.finished(id, error(), at(1)).is_none());
    assert_eq!(reads.nr_made(), 0);
}

#[test]
fn a_failure_is_tried_again_after_a_growing_pause() {
    let mut reads = Reads::new();
    ask(&mut reads, wanted(1..2));
    let mut now = 0;
    for pause in [10, 20] {
        let (id, _) = make(&mut reads)[0].clone();
        assert!(reads.finished(id, error(), at(now)).is_none());
        now += pause;
        assert!(reads.expired(at(now - 1)).is_none());
        assert_eq!((make(&mut reads).len(), reads.soonest()), (0, Some(at(now))));
        assert!(reads.expired(at(now)).is_none());
    }
    let (id, _) = make(&mut reads)[0].clone();
    let ended = reads.finished(id, error(), at(now)).unwrap();
    assert!(matches!(ended.how, How::Failed { tries: 3, .. }), "{ended:?}");
    assert_eq!(waiting(&mut reads, id), 1);
}

#[test]
fn pages_that_fail_together_are_asked_for_alone() {
    let mut reads = Reads::new();
    ask(&mut reads, wanted(1..2));
    ask(&mut reads, wanted(2..3));
    let (id, _) = make(&mut reads)[0].clone();
    let ended = reads.finished(id, error(), at(1)).unwrap();
    assert!(matches!(ended.how, How::Again { alone: true }), "{ended:?}");
}

#[test]
fn a_deadline_ends_the_wait_and_not_the_read() {
    let mut reads = Reads::new();
    ask(&mut reads, wanted(1..2));
    ask(&mut reads, wanted(5..6));
    ask(&mut reads, wanted(9..10));
    let made = make(&mut reads);
    assert_eq!((made.len(), reads.soonest()), (2, Some(at(1000))));
    assert!(reads.expired(at(999)).is_none());
    let mut tries = Vec::new();
    while let Some(Ended { id, how }) = reads.expired(at(1000)) {
        let How::Failed { tries: made, .. } = how else { panic!("{how:?}") };
        tries.push(made);
        assert_eq!(waiting(&mut reads, id), 1);
    }
    tries.sort_unstable();
    assert_eq!(tries, [0, 1, 1]);
    assert_eq!(reads.soonest(), None);
    // Their workers are not free, and nobody joins what may never end.
    assert_eq!((reads.nr_made(), reads.covering(1, 1)), (2, None));
    ask(&mut reads, wanted(1..2));
    assert_eq!(make(&mut reads).len(), 0);
    assert!(reads.finished(made[0].0, Outcome::Installed { pages: 1 }, at(1001)).is_none());
    assert_eq!(make(&mut reads).len(), 1);
}

#[test]
fn reads_of_what_was_taken_back_end() {
    let mut reads = Reads::new();
    ask(&mut reads, wanted(1..2));
    make(&mut reads);
    ask(&mut reads, wanted(5..6));
    // Exchanged for one that has all that it had.
    assert!(reads.outdated(1, 0).is_none());
    ask(&mut reads, Wanted { generation: 1, ..wanted(7..8) });
    let mut ended = 0;
    while let Some(Ended { id, how }) = reads.outdated(1, 1) {
        assert!(matches!(how, How::Again { alone: false }));
        assert_eq!(waiting(&mut reads, id), 1);
        ended += 1;
    }
    assert_eq!((ended, reads.nr_made(), reads.covering(1, 1), reads.covering(1, 5)), (2, 1, None, None));
    assert_eq!(make(&mut reads).len(), 1);
}
