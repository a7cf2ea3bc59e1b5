//! The last step of an attach: the area is served.

use std::sync::Arc;

use super::command::{Command, NotEntered};
use super::readahead::Streams;
use super::shared::EngineShared;
use crate::process::gate;
use crate::space::table::{Area, InsertError};
use crate::space::{SpaceId, Target};
use crate::vmap::core::{Contents, VmapCore};
use crate::{Error, Result};

/// An area that is to be served.
#[derive(Clone, Copy)]
pub(crate) struct NewArea {
    pub(crate) start: usize,
    pub(crate) end: usize,
    pub(crate) pgoff: u64,
    pub(crate) region: u64,
    pub(crate) writable: bool,
    pub(crate) inherit: bool,
}

/// What came of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Inserted {
    Served,
    /// The address space is changing: try again.
    Later,
}

/// Has a counted area served from the vmap's list, the one of now, even if it is exchanged at this moment. Waits for
/// nobody but the fault-handling thread.
///
/// # Errors
///
/// [`Error::AddressTaken`] when the table has the range as another area's; [`Error::Shutdown`]; [`Error::Sys`].
pub(crate) fn insert(shared: &EngineShared, space: SpaceId, vmap: &Arc<VmapCore>, new: NewArea) -> Result<Inserted> {
    let NewArea { start, end, pgoff, region, writable, inherit } = new;
    vmap.set_diverging();
    let Contents { list, window, generation, kept_since } = vmap.contents();
    let (page, list, window, streams) = (vmap.page(), list.clone(), window.clone(), Streams::default());
    let target = Target { vmap: Arc::clone(vmap), list, window, generation, kept_since, page, inherit, streams };
    let area = Area { start, end, pgoff, region, writable, leaving: false, target };
    let inserted = {
        // A child that another thread forks has the area or does not have it, as the engine knows.
        let _gate = gate();
        shared.handler.ask(|reply| Command::Insert { space, area, reply })?
    };
    match inserted {
        Ok(()) => {}
        Err(NotEntered::Changing(_)) => return Ok(Inserted::Later),
        Err(NotEntered::Ended(_)) => return Err(Error::Shutdown),
        Err(NotEntered::Table(InsertError::Overlap(_))) => {
            return Err(Error::AddressTaken { addr: start, len: end - start });
        }
        Err(NotEntered::Table(InsertError::NoMemory(_, errno))) => {
            return Err(Error::sys("mmap for the area table")(errno));
        }
    }
    let now = vmap.contents();
    if now.generation != generation {
        // It was exchanged meanwhile, perhaps everywhere else before this area was there.
        let (vmap, contents) = (vmap.id, now.clone());
        // When the engine has ended, nothing is served from either.
        let _ = shared.handler.ask(|reply| Command::SetList { vmap, contents, reply });
    }
    Ok(Inserted::Served)
}
