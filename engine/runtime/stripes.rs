//! Stripes: userfaultfds that parts of regions have to themselves.
//!
//! Closing one while anything is registered with it would turn missing pages into zero pages, and what `mremap` has grown no
//! event tells. So a stripe whose region is gone is kept, idle, for the next region, until the engine ends: there are as
//! many as were ever in use at once.

use std::sync::{Arc, Mutex, PoisonError};

use nix::errno::Errno;

use super::command::Command;
use super::shared::EngineShared;
use crate::process::ledger::Private;
use crate::space::table::AreaTable;
use crate::space::{OWN_SPACE, Space, SpaceId};
use crate::sys::Userfault;
use crate::{Error, Result};

/// The most parts of a region that have a userfaultfd each ([`AttachOptions::stripes`](crate::AttachOptions::stripes)).
pub const STRIPES_MAX: usize = 64;

/// A userfaultfd, and the space that the fault-handling thread serves by it.
pub(crate) struct Stripe {
    pub(crate) space: SpaceId,
    pub(crate) uffd: Arc<Private<Userfault>>,
}

/// The stripes of an engine that no region has.
#[derive(Default)]
pub(crate) struct IdleStripes(Mutex<Vec<Stripe>>);

/// The stripes of one region; they are idle again when it is dropped.
pub(crate) struct Stripes {
    shared: Arc<EngineShared>,
    stripes: Vec<Stripe>,
}

impl Stripes {
    /// Takes so many, new ones if there are too few.
    ///
    /// # Errors
    ///
    /// [`Error::Open`] and [`Error::Sys`] for want of descriptors, memory or epoll watches; [`Error::Shutdown`].
    pub(crate) fn take(shared: &Arc<EngineShared>, nr: usize) -> Result<Stripes> {
        let mut taken = Stripes { shared: Arc::clone(shared), stripes: Vec::with_capacity(nr) };
        while taken.stripes.len() < nr {
            let idle = shared.idle_stripes.0.lock().unwrap_or_else(PoisonError::into_inner).pop();
            taken.stripes.push(idle.map_or_else(|| new(shared), Ok)?);
        }
        Ok(taken)
    }

    pub(crate) fn as_slice(&self) -> &[Stripe] {
        &self.stripes
    }
}

impl Drop for Stripes {
    fn drop(&mut self) {
        let stripes = std::mem::take(&mut self.stripes);
        if stripes.first().is_none_or(|stripe| stripe.uffd.is_here()) {
            self.shared.idle_stripes.0.lock().unwrap_or_else(PoisonError::into_inner).extend(stripes);
        } else {
            // In a forked child they are the parent's.
            std::mem::forget(stripes);
        }
    }
}

/// Has one more served.
fn new(shared: &EngineShared) -> Result<Stripe> {
    let uffd = Arc::new(Private::open(|| shared.opener.open(shared.features).map(|(uffd, _)| uffd))?);
    let counters = shared.new_stripe_counters();
    let id = counters.id;
    let space = Space {
        id,
        parent: OWN_SPACE,
        uffd: Some(Arc::clone(&uffd)),
        masks: None,
        aside: None,
        foreign: None,
        table: AreaTable::new(),
        counters: Arc::clone(&counters),
        unheard: Mutex::new(None),
    };
    match shared.handler.ask(|reply| Command::TakeStripe { space, reply })? {
        Ok(()) => {}
        Err((_, Errno::ESHUTDOWN)) => return Err(Error::Shutdown),
        Err((_, errno)) => return Err(Error::sys("epoll_ctl or mmap for a stripe")(errno)),
    }
    shared.spaces_push(counters);
    Ok(Stripe { space: id, uffd })
}
