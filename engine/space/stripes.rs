//! The spaces that one process consists of: its own, and for the engine's process those of stripes.
//!
//! A stripe is a part of a region that has a userfaultfd of its own ([`AttachOptions::stripes`](crate::AttachOptions::stripes)),
//! and so a table of its own: each userfaultfd tells its own events in order, but nothing says how those of two follow on each
//! other. What lies beside a stripe may be another's, so whoever looks around an address looks at all of them.

use super::table::Area;
use super::{OWN_SPACE, Space, SpaceId, Target};

/// Marks the ids of stripes, which come after those of processes that are forked, and before those of foreign spaces.
pub(crate) const STRIPE: SpaceId = 1 << 60;

/// Tells whether a space is a stripe.
pub(crate) fn is_stripe(space: SpaceId) -> bool {
    (STRIPE..STRIPE << 1).contains(&space)
}

/// Tells whether a space is of the engine's own process.
pub(crate) fn is_own(space: SpaceId) -> bool {
    space == OWN_SPACE || is_stripe(space)
}

/// Tells whether two spaces are of one process.
pub(crate) fn is_same_process(one: SpaceId, other: SpaceId) -> bool {
    one == other || (is_own(one) && is_own(other))
}

/// The spaces of the process that a space is of, among all.
pub(crate) fn spaces_of(spaces: &[Space], space: SpaceId) -> impl Iterator<Item = &Space> {
    let place = |id| spaces.partition_point(|space| space.id < id);
    let slice = |from, to| &spaces[place(from)..place(to)];
    let (first, stripes) = if is_own(space) {
        (slice(OWN_SPACE, OWN_SPACE + 1), slice(STRIPE, STRIPE << 1))
    } else {
        (slice(space, space.saturating_add(1)), &[][..])
    };
    first.iter().chain(stripes)
}

/// Tells whether the process that a space is of consists of more than one.
pub(crate) fn is_striped(spaces: &[Space], space: SpaceId) -> bool {
    spaces_of(spaces, space).nth(1).is_some()
}

/// Walks over the areas of the process that a space is of, by address.
pub(crate) fn areas_of(spaces: &[Space], space: SpaceId) -> impl Iterator<Item = &Area<Target>> {
    let mut from = 0;
    std::iter::from_fn(move || {
        let next = spaces_of(spaces, space).filter_map(|space| space.table.overlapping(from, usize::MAX).next());
        let next = next.min_by_key(|area| area.start)?;
        from = next.end;
        Some(next)
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::space::NO_SPACE;
    use crate::space::foreign::FOREIGN;

    #[test]
    fn stripes_are_of_the_own_process_and_nothing_else_is() {
        for (id, stripe, own) in [
            (OWN_SPACE, false, true),
            (1, false, false),
            (STRIPE - 1, false, false),
            (STRIPE, true, true),
            (STRIPE | 7, true, true),
            (FOREIGN, false, false),
            (FOREIGN | 7, false, false),
            (NO_SPACE, false, false),
        ] {
            assert_eq!((is_stripe(id), is_own(id)), (stripe, own), "{id:#x}");
            assert_eq!(is_same_process(id, OWN_SPACE), own);
            assert!(is_same_process(id, id));
        }
        assert!(is_same_process(STRIPE | 1, STRIPE | 2));
        assert!(!is_same_process(1, 2) && !is_same_process(FOREIGN | 1, FOREIGN | 2));
        assert_eq!(spaces_of(&[], NO_SPACE).count(), 0);
    }
}
