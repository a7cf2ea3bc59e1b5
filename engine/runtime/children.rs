//! The engine's half of a fork.

use std::os::fd::OwnedFd;
use std::sync::Arc;

use super::command::{Command, Forked};
use super::handles::Request;
use super::shared::EngineShared;
use crate::process::ledger::Private;
use crate::space::mmap_vec::MmapVec;
use crate::space::{AreaRecord, SpaceId};
use crate::{Error, Result};

/// In the engine's process: makes the space of a child of `parent`, and gives its lifeline to the keeper.
pub(crate) fn fork_space(
    shared: &Arc<EngineShared>,
    parent: SpaceId,
    lifeline: Private<OwnedFd>,
) -> Result<MmapVec<AreaRecord>> {
    let counters = shared.new_space_counters();
    let child = Arc::clone(&counters);
    let Forked { records, outcome } =
        shared.handler.ask(|reply| Command::Fork { parent, child, records: MmapVec::new(), reply })?;
    outcome.map_err(Error::sys("making room for a child's areas"))?;
    shared.keeper.send(Request::Nascent { counters, lifeline });
    Ok(records)
}

/// In the engine's process: tells the areas that a child of `parent` would inherit, from the `skip`ped on, `most` of
/// them. Takes no descriptor.
pub(crate) fn inherited_areas(
    shared: &EngineShared,
    parent: SpaceId,
    skip: usize,
    most: usize,
) -> Result<MmapVec<AreaRecord>> {
    let records = MmapVec::new();
    let Forked { records, outcome } =
        shared.handler.ask(|reply| Command::Inherited { parent, skip, most, records, reply })?;
    outcome.map_err(Error::sys("mmap for the areas of a child"))?;
    Ok(records)
}
