//! Which member of the crew is on which processor, and whose faults it answers there.

use nix::sched::{CpuSet, sched_getaffinity};
use nix::unistd::Pid;

use super::crew::HANDLERS_MAX;
use super::whereabouts;
use crate::space::SpaceId;
use crate::space::foreign::is_foreign;
use crate::space::stripes::is_same_process;

/// Spaces for which one member waits, at the most; the others are left to the owner.
const SPACES: usize = 8;

/// One member's place.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Post {
    pub(crate) cpu: i32,
    spaces: [SpaceId; SPACES],
    len: usize,
}

/// Everybody's place.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Roster {
    /// By processor.
    posts: [Post; HANDLERS_MAX],
    len: usize,
    /// Everybody waits for every space there is, and there will be; but for foreign ones, which are the owner's.
    all: bool,
    /// Threads are on one processor that could be on several.
    pub(crate) crowded: bool,
}

impl Roster {
    pub(crate) const EMPTY: Roster = Roster {
        posts: [Post { cpu: 0, spaces: [0; SPACES], len: 0 }; HANDLERS_MAX],
        len: 0,
        all: false,
        crowded: false,
    };

    /// A member on each processor on which threads are that fault, and if those are fewer than the threads, on others of
    /// `allowed`; `most` at the most. A thread that can't be found is nowhere.
    ///
    /// Threads that wait for one another's faults, or for one handler's, are brought together on one processor by the
    /// scheduler, and parted again as soon as they needn't.
    pub(crate) fn of(threads: &[(SpaceId, i32)], allowed: &Roster, most: usize) -> Roster {
        let mut roster = Roster::EMPTY;
        let is_first =
            |&(at, seen): &(usize, &(SpaceId, i32))| !threads[..at].iter().any(|&of| is_same_thread(of, *seen));
        let most = most.min(threads.iter().enumerate().filter(is_first).count());
        for &(space, thread) in threads {
            if let Some(cpu) = whereabouts::of(thread) {
                roster.add(cpu as i32, most, Some(space));
            }
        }
        for post in allowed.posts() {
            if (1..most).contains(&roster.len) && roster.posts().iter().all(|other| other.cpu != post.cpu) {
                roster.crowded = true;
                threads.iter().for_each(|&(space, _)| roster.add(post.cpu, most, Some(space)));
            }
        }
        // The same threads in another order are the same roster.
        roster.posts[..roster.len].sort_unstable_by_key(|post| post.cpu);
        roster.posts[..roster.len].iter_mut().for_each(|post| post.spaces[..post.len].sort_unstable());
        roster
    }

    /// A member for everything on each of the first processors on which this thread may run.
    pub(crate) fn everywhere() -> Roster {
        let mut roster = Roster { all: true, ..Roster::EMPTY };
        if let Ok(set) = sched_getaffinity(Pid::from_raw(0)) {
            let allowed = (0..CpuSet::count()).filter(|&cpu| set.is_set(cpu).unwrap_or(false));
            allowed.for_each(|cpu| roster.add(cpu as i32, HANDLERS_MAX, None));
        }
        roster
    }

    fn add(&mut self, cpu: i32, most: usize, space: Option<SpaceId>) {
        let index = match self.posts().iter().position(|post| post.cpu == cpu) {
            Some(index) => index,
            None if self.len < most.min(HANDLERS_MAX) => {
                self.posts[self.len].cpu = cpu;
                self.len += 1;
                self.len - 1
            }
            None => return,
        };
        let post = &mut self.posts[index];
        if let Some(space) = space.filter(|space| post.len < SPACES && !post.spaces[..post.len].contains(space)) {
            post.spaces[post.len] = space;
            post.len += 1;
        }
    }

    pub(crate) fn posts(&self) -> &[Post] {
        &self.posts[..self.len]
    }

    /// Tells whether the member at `post` waits for a space.
    pub(crate) fn waits_at(&self, post: usize, space: SpaceId) -> bool {
        let Some(post) = self.posts().get(post).filter(|_| !is_foreign(space)) else { return false };
        self.all || post.spaces[..post.len].contains(&space)
    }

    /// Tells how many members wait for a space.
    pub(crate) fn waiters(&self, space: SpaceId) -> usize {
        (0..self.len).filter(|&post| self.waits_at(post, space)).count()
    }
}

/// Tells whether faults of spaces are one thread's: numbers of threads say that within one process only.
pub(crate) fn is_same_thread(one: (SpaceId, i32), other: (SpaceId, i32)) -> bool {
    one.1 == other.1 && is_same_process(one.0, other.0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::space::stripes::STRIPE;

    #[test]
    fn the_same_threads_in_another_order_are_the_same_roster() {
        let me = nix::unistd::gettid().as_raw();
        let of = |threads: &[(SpaceId, i32)], most| Roster::of(threads, &Roster::EMPTY, most);
        let one = of(&[(3, me), (1, me), (3, me)], 4);
        assert_eq!(one, of(&[(1, me), (3, me)], 4));
        assert_eq!((one.posts().len(), one.waiters(1), one.waiters(3), one.waiters(2)), (1, 1, 1, 0));
        assert_eq!(of(&[(1, me), (2, i32::MAX)], 0), Roster::EMPTY);
    }

    #[test]
    fn threads_on_one_processor_have_members_on_others_too() {
        let (me, allowed) = (nix::unistd::gettid().as_raw(), Roster::everywhere());
        let found = Roster::of(&[(1, me), (2, me)], &allowed, 4);
        assert_eq!(found.posts().len(), allowed.posts().len().min(2));
        assert_eq!(Roster::of(&[(1, me)], &allowed, 4).posts().len(), 1);
        assert_eq!(Roster::of(&[(1, i32::MAX), (1, i32::MAX - 1)], &allowed, 4), Roster::EMPTY);
    }

    /// A thread that touches several stripes needs one member, who waits for all of them.
    #[test]
    fn a_thread_in_several_stripes_is_one() {
        let (me, allowed) = (nix::unistd::gettid().as_raw(), Roster::everywhere());
        let roster = Roster::of(&[(STRIPE | 1, me), (STRIPE | 2, me), (0, me)], &allowed, 4);
        assert_eq!(roster.posts().len(), 1);
        assert_eq!([STRIPE | 1, STRIPE | 2, 0, 1].map(|space| roster.waiters(space)), [1, 1, 1, 0]);
    }

    #[test]
    fn everybody_waits_for_everything() {
        let roster = Roster::everywhere();
        assert_eq!(roster.waiters(17), roster.posts().len());
        assert!(!roster.waits_at(roster.posts().len(), 17));
    }
}
