//! When the crew is called, and to which places: a few words of bookkeeping for each fault, and rarely a look.

use std::sync::atomic::Ordering;

use super::crew::{Crew, HANDLERS_MAX, Lateness, Member, REMEMBERED};
use super::crew_roster::{Roster, is_same_thread};
use crate::space::SpaceId;
use crate::sys::clock;

/// Threads that are remembered.
const THREADS: usize = 4;
/// A space and a thread of which there is none.
const NOBODY: (SpaceId, i32) = (0, 0);
/// Threads that the owner and all members remember.
const THREADS_OF_ALL: usize = THREADS + HANDLERS_MAX * REMEMBERED;
/// How often another thread than the last must fault before it is looked where they are.
const SWITCHES: u32 = 32;
/// The same, at the most: each look that finds them on one processor doubles it.
const MOST_SWITCHES: u32 = 4096;
/// Switches that took longer don't count, in milliseconds.
const SOON_MS: i64 = 100;
/// How soon the owner looks after a crew that was called, and how late at the latest, in milliseconds.
const TICKS_MS: (u16, u16) = (5, 40);
/// How often it is looked whether the crew is still needed, in milliseconds.
const REVIEW_MS: i64 = 20;
/// A crew of which only one member answers more than one fault in so many is not needed.
const SHARE: u64 = 16;
/// A crew that leaves aside more than one message in so many is not of use.
const MOST_ASIDE: u64 = 4;
/// Members that answer less than this between two looks of the owner, which itself finds faults, don't get a processor.
const FEW: u64 = 50;
/// How often in a row that, or a member that does not get on, may be found.
const STRIKES: u32 = 2;
/// How long the crew is not called after it was of no use, in milliseconds: twice as long each time, up to the second.
const REST_MS: (i64, i64) = (1_000, 64_000);

/// What shall become of a crew that was called.
#[allow(clippy::large_enum_variant, reason = "a box would be allocated")]
pub(crate) enum Review {
    GoOn,
    /// Other places.
    Direct(Roster),
    LetGo,
}

/// Decides when the crew is called, and knows where it is.
pub(crate) struct Caller {
    /// The crew is to be on all the time.
    always: bool,
    /// Where members may be.
    allowed: Roster,
    /// Where the crew is.
    roster: Roster,
    /// The threads that faulted last, the last one first.
    threads: [(SpaceId, i32); THREADS],
    switches: u32,
    switches_before_a_look: u32,
    since_ms: i64,
    looked_ms: i64,
    /// Not before then.
    rest_until_ms: i64,
    rest_ms: i64,
    /// What each member had answered at the last review.
    answered: [u64; HANDLERS_MAX],
    /// What all had answered at the owner's last look.
    answered_before_tick: u64,
    /// Each member's turn at the owner's last look.
    turns: [u32; HANDLERS_MAX],
    /// How long until the owner looks after the members the next time, in milliseconds.
    tick_ms: u16,
    aside: u64,
    strikes: u32,
    /// Members may have been given the processor.
    forward: bool,
    /// Reviews in a row that found one member to answer all.
    strikes_of_one: u32,
}

impl Caller {
    pub(crate) fn new(always: bool) -> Caller {
        Caller {
            always,
            allowed: Roster::everywhere(),
            roster: Roster::EMPTY,
            threads: [NOBODY; THREADS],
            switches: 0,
            switches_before_a_look: SWITCHES,
            since_ms: 0,
            looked_ms: 0,
            rest_until_ms: 0,
            rest_ms: REST_MS.0,
            answered: [0; HANDLERS_MAX],
            answered_before_tick: 0,
            turns: [0; HANDLERS_MAX],
            tick_ms: TICKS_MS.0,
            aside: 0,
            strikes: 0,
            forward: false,
            strikes_of_one: 0,
        }
    }

    /// Tells whether the crew is never let go.
    pub(crate) fn is_always(&self) -> bool {
        self.always
    }

    /// How long the owner may sleep before it looks after the members, in milliseconds; `None` is for ever.
    ///
    /// Soon when they have just been called, and later as long as they get on: each look is a thread more that wants a
    /// processor, for which the scheduler may put a thread that faults beside another.
    pub(crate) fn tick_ms(&self) -> Option<u16> {
        (!self.always).then_some(self.tick_ms)
    }

    /// Where the crew is.
    pub(crate) fn roster(&self) -> &Roster {
        &self.roster
    }

    /// Where to call the crew at the start, if it is to be on all the time.
    pub(crate) fn at_start(&self) -> Option<Roster> {
        self.always.then_some(self.allowed)
    }

    /// Notes a fault that the owner answered; answers where to call the crew, if it should.
    pub(crate) fn saw(&mut self, space: SpaceId, thread: i32, crew: &Crew) -> Option<Roster> {
        let seen = (space, thread);
        if seen == self.threads[0] || thread == 0 {
            return None;
        }
        let known = self.threads.iter().position(|&known| known == seen).unwrap_or(THREADS - 1);
        // A thread that goes from stripe to stripe is one.
        let switches = !is_same_thread(seen, self.threads[0]);
        self.threads[..=known].rotate_right(1);
        self.threads[0] = seen;
        self.switches += u32::from(switches);
        if !switches || self.switches < self.switches_before_a_look || crew.is_on() {
            return None;
        }
        self.switches = 0;
        let now = now_ms();
        let pause = now - std::mem::replace(&mut self.since_ms, now);
        if pause > SOON_MS || now < self.rest_until_ms {
            return None;
        }
        let threads = std::mem::replace(&mut self.threads, [NOBODY; THREADS]);
        let nr_threads = threads.iter().position(|&seen| seen == NOBODY).unwrap_or(THREADS);
        let roster = Roster::of(&threads[..nr_threads], &self.allowed, crew.members.len());
        if roster.posts().len() < 2 {
            self.switches_before_a_look = (self.switches_before_a_look * 2).min(MOST_SWITCHES);
            return None;
        }
        self.switches_before_a_look = SWITCHES;
        Some(roster)
    }

    /// Notes that the crew was called to these places, or sent there.
    pub(crate) fn called(&mut self, roster: Roster, crew: &Crew) {
        self.roster = roster;
        self.tick_ms = TICKS_MS.0;
        self.since_ms = now_ms();
        self.looked_ms = self.since_ms;
        (self.aside, self.strikes) = (0, 0);
        for (index, member) in crew.members.iter().enumerate() {
            self.answered[index] = member.answered.load(Ordering::Relaxed);
            self.turns[index] = member.turn.load(Ordering::Relaxed);
        }
        self.answered_before_tick = self.answered.iter().sum();
    }

    /// Notes that the crew was let go; answers where it was.
    pub(crate) fn let_go(&mut self) -> Roster {
        (self.forward, self.strikes_of_one) = (false, 0);
        std::mem::replace(&mut self.roster, Roster::EMPTY)
    }

    /// Notes that a member could not answer.
    pub(crate) fn took(&mut self) {
        self.aside += 1;
    }

    /// It is of no use to call the crew for a while.
    fn rest(&mut self) -> Review {
        self.rest_until_ms = now_ms() + self.rest_ms;
        self.rest_ms = (self.rest_ms * 2).min(REST_MS.1);
        Review::LetGo
    }

    /// Tells whether a member does not get on, to which it gives the processor; or whether all together do not, and the owner
    /// `found` their faults.
    fn are_hindered(&mut self, crew: &Crew, found: usize) -> bool {
        let (mut stuck, mut still) = (false, false);
        for (before, member) in self.turns.iter_mut().zip(&crew.members) {
            let turn = member.turn.load(Ordering::Relaxed);
            if turn == std::mem::replace(before, turn) && member.is_back.load(Ordering::Relaxed) {
                still = true;
                stuck |= turn % 2 == 1 && member.step(false);
            }
        }
        let answered: u64 = crew.members.iter().map(|member| member.answered.load(Ordering::Relaxed)).sum();
        let few = answered - std::mem::replace(&mut self.answered_before_tick, answered) < FEW;
        stuck || (still && few && found > 0)
    }

    /// Looks after the members, the crossing being closed: whether they get a processor (`lateness`: one had to be called forward;
    /// `found`: faults that none of them had read), and now and then whether they are still needed, and where.
    pub(crate) fn review(&mut self, crew: &Crew, lateness: Lateness, found: usize) -> Review {
        if self.always {
            return Review::GoOn;
        }
        let now = now_ms();
        let late = lateness == Lateness::Hindered;
        self.forward |= lateness == Lateness::HasWoken;
        // The owner may have been woken by anything: what comes too soon after a look says nothing.
        let mut hindered = late;
        if late || now - self.looked_ms >= i64::from(TICKS_MS.0) {
            self.looked_ms = now;
            hindered |= self.are_hindered(crew, found);
            self.forward |= hindered;
            self.strikes = if hindered { self.strikes + 1 } else { 0 };
            let calm = !hindered && !self.roster.crowded;
            self.tick_ms = if calm { (self.tick_ms * 2).min(TICKS_MS.1) } else { TICKS_MS.0 };
        }
        if self.strikes >= STRIKES {
            return self.rest();
        }
        // Who was just given the processor has not run yet.
        if hindered || now - self.since_ms < REVIEW_MS {
            return Review::GoOn;
        }
        self.since_ms = now;
        let mut answers = [0; HANDLERS_MAX];
        for (index, member) in crew.members.iter().enumerate() {
            let answered = member.answered.load(Ordering::Relaxed);
            answers[index] = answered - std::mem::replace(&mut self.answered[index], answered);
        }
        let all: u64 = answers.iter().sum();
        if std::mem::take(&mut self.aside) * MOST_ASIDE > all {
            return self.rest();
        }
        let of_owner = std::mem::replace(&mut self.threads, [NOBODY; THREADS]).into_iter();
        let mut threads = [NOBODY; THREADS_OF_ALL];
        let mut nr_threads = 0;
        for seen in crew.members.iter().flat_map(Member::forget_seen).chain(of_owner) {
            if seen != NOBODY && !threads[..nr_threads].contains(&seen) {
                threads[nr_threads] = seen;
                nr_threads += 1;
            }
        }
        let busy = answers.iter().filter(|&&answers| answers * SHARE > all).count();
        let roster = Roster::of(&threads[..nr_threads], &self.allowed, crew.members.len());
        if all == 0 || roster.posts().len() < 2 {
            return Review::LetGo;
        }
        self.strikes_of_one = if busy < 2 { self.strikes_of_one + 1 } else { 0 };
        if self.strikes_of_one >= STRIKES {
            return self.rest();
        }
        if self.strikes_of_one == 0 {
            self.rest_ms = REST_MS.0;
        }
        // Those who were given the processor step back again.
        let forward = std::mem::take(&mut self.forward);
        if roster == self.roster && !forward { Review::GoOn } else { Review::Direct(roster) }
    }
}

/// A clock that ticks with the scheduler, which is cheap to read.
fn now_ms() -> i64 {
    clock::coarse_ns() / 1_000_000
}
