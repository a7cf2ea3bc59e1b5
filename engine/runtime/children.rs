//! The engine's half of a fork, and of taking in an unrelated process.

use std::os::fd::OwnedFd;
use std::sync::Arc;

use nix::errno::Errno;

use super::command::{Command, Forked};
use super::handles::Request;
use super::patience::Patience;
use super::shared::EngineShared;
use crate::process::ledger::Private;
use crate::publish::outsider::Outsider;
use crate::space::mmap_vec::MmapVec;
use crate::space::{AreaRecord, NO_SPACE, SpaceId};
use crate::stats::SpaceCounters;
use crate::{Error, Result};

/// In the engine's process: makes the space of a child of `parent`, and gives its lifeline to the keeper. An `outsider` is
/// one of a process that is not trusted.
pub(crate) fn fork_space(
    shared: &Arc<EngineShared>,
    parent: SpaceId,
    lifeline: Private<OwnedFd>,
    outsider: Option<(Arc<SpaceCounters>, Outsider)>,
) -> Result<MmapVec<AreaRecord>> {
    let (counters, outsider) = match outsider {
        Some((counters, outsider)) => (counters, Some(Box::new((outsider, None)))),
        None => (shared.new_space_counters(), None),
    };
    let mut patience = Patience::new();
    let records = loop {
        let child = Arc::clone(&counters);
        let Forked { records, outcome } =
            shared.handler.ask(|reply| Command::Fork { parent, child, records: MmapVec::new(), reply })?;
        match outcome {
            Ok(()) => break records,
            // Its address space is changing.
            Err(Errno::EAGAIN) => patience.wait()?,
            Err(errno) => return Err(Error::sys("making room for a child's areas")(errno)),
        }
    };
    shared.keeper.send(Request::Nascent { counters, lifeline, outsider });
    Ok(records)
}

/// In the engine's process: makes the space of an unrelated process, which has no areas yet, and gives its lifeline and its
/// pidfd to the keeper.
pub(crate) fn new_space(
    shared: &Arc<EngineShared>,
    counters: Arc<SpaceCounters>,
    lifeline: Private<OwnedFd>,
    outsider: Outsider,
    pidfd: Private<OwnedFd>,
) -> Result<()> {
    let (parent, child) = (NO_SPACE, Arc::clone(&counters));
    let Forked { outcome, .. } =
        shared.handler.ask(|reply| Command::Fork { parent, child, records: MmapVec::new(), reply })?;
    outcome.map_err(Error::sys("making room for a process"))?;
    let outsider = Some(Box::new((outsider, Some(pidfd))));
    shared.keeper.send(Request::Nascent { counters, lifeline, outsider });
    Ok(())
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
