//! Pages memory in on demand: a page list in, shared memory out, SIGBUS at the edges.

#![warn(clippy::all)]

mod error;
mod fork;
mod kiobuf;
mod page;
mod region;
mod runtime;
mod space;
mod sys;
mod vmap;

pub use error::{Error, Result};
pub use kiobuf::{Arena, ExtentInfo, ExtentKind, Kiobuf, LockWait, PageLock, PageSource};
pub use page::page_size;
pub use region::{AttachOptions, Region, Sharing};
pub use runtime::engine::{Engine, EngineBuilder, FAULT_AROUND_MAX_PAGES, Shutdown, WORKERS_MAX};
pub use runtime::stats::{SpaceStats, Stats};
pub use sys::{
    Features, Ioctls, MemoryKind, Named, OpenAttempt, OpenFailure, OpenStep, OpenWay, Probe, probe, probe_way,
    range_ioctls,
};
pub use vmap::{Revoke, Vmap, VmapBuilder};
