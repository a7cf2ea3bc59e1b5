//! An adopted process and those that were forked from it, as long as any of them lives.

use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use crate::space::SpaceId;
use crate::stats::SpaceCounters;

/// Which of them live; changed by the keeper.
#[derive(Debug, Default)]
pub(crate) struct Family {
    members: Mutex<Vec<Arc<SpaceCounters>>>,
    /// Signalled when the last is gone.
    gone: Condvar,
}

impl Family {
    fn lock(&self) -> MutexGuard<'_, Vec<Arc<SpaceCounters>>> {
        self.members.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn enter(&self, member: Arc<SpaceCounters>) {
        self.lock().push(member);
    }

    pub(crate) fn leave(&self, space: SpaceId) {
        let mut members = self.lock();
        members.retain(|member| member.id != space);
        if members.is_empty() {
            self.gone.notify_all();
        }
    }

    pub(crate) fn members(&self) -> Vec<Arc<SpaceCounters>> {
        self.lock().clone()
    }

    /// Waits until none is left; answers whether that is so.
    pub(crate) fn wait_gone(&self, timeout: Duration) -> bool {
        let deadline = Instant::now().checked_add(timeout);
        let mut members = self.lock();
        while !members.is_empty() {
            let left = deadline
                .map_or(Duration::from_secs(3600), |deadline| deadline.saturating_duration_since(Instant::now()));
            if left.is_zero() {
                return false;
            }
            members = self.gone.wait_timeout(members, left).unwrap_or_else(PoisonError::into_inner).0;
        }
        true
    }
}
