//! A userfaultfd-based paging engine: a page list in, shared memory out, SIGBUS at the edges.
//!
//! - A [`Kiobuf`] lists pages: memory, ranges of files, a [`PageSource`], zeros, holes.
//! - An [`Engine`] publishes it as a [`Vmap`]: shared memory with a count of attached areas and a deref callback.
//! - [`Vmap::attach`] maps it: a [`Region`]. Nothing is there until it is touched. A touch gets exactly the right bytes,
//!   or SIGBUS for a page that can't be had.
//! - Forked processes inherit every region, share its pages, and are counted.
//!
//! ```
//! use kiomap::{Arena, AttachOptions, Engine, Kiobuf};
//!
//! # fn main() -> kiomap::Result<()> {
//! let mut heap = Arena::new(100)?;
//! heap.fill(0xff);
//! let mut list = Kiobuf::new();
//! list.map_kernel(heap)?;
//!
//! let engine = Engine::new()?;
//! let vmap = engine.vmap(&list)?;
//! let region = vmap.attach(&AttachOptions::new())?;
//! let mut bytes = [0; 4];
//! region.read_at(12345, &mut bytes)?;
//! assert_eq!(bytes, [0xff; 4]);
//! # Ok(())
//! # }
//! ```
//!
//! Processes that were not forked from this one attach a vmap over a Unix socket ([`Vmap::publish`], [`Client`]), and a userfaultfd that
//! another process made is served with [`Engine::adopt`]; with the cargo feature `firecracker` that of a VM monitor.
//!
//! Pages may come from slow places, which workers read: [`FileSource`], [`ReadSource`], [`FnSource`], with the cargo feature
//! `zstd` compressed images (`ZstdImage`), with `object-store` objects in S3 and other stores (`ObjectSource`), and whatever
//! else is a [`PageSource`].
//!
//! With the cargo feature `tracing` it tells a subscriber of that crate what happens outside the way of a fault (targets
//! `kiomap::…`), on a thread of its own; `docs/operations.md` lists the events.
//!
//! The library never prints, never aborts, and installs no signal handler unless asked to ([`Delivery::InThread`]). Its
//! threads block every signal. It installs
//! fork handlers (`pthread_atfork`) when the first engine is built.
//!
//! # Safety of what is mapped
//!
//! Other processes may write to a region at any time, so its bytes are not a Rust slice unless the caller knows better
//! ([`Region::as_slice`] is unsafe). [`Region::read_at`], [`Region::write_at`] and the atomics are safe. A touch of a page
//! that can't be had raises SIGBUS, whose default action ends the process: the length of a region and the holes of a list
//! are the caller's to respect.

mod adopt;
mod error;
#[cfg(feature = "firecracker")]
pub mod firecracker;
mod fork;
mod inthread;
mod kiobuf;
mod page;
mod process;
mod publish;
mod region;
mod runtime;
mod snapshot;
mod source;
mod space;
mod stats;
mod sys;
mod trace;
mod vmap;
mod working_set;

pub use adopt::{AdoptOptions, Adopted, AdoptedArea, Outside, Refusal, Release};
pub use error::{Error, Result, SourceFault};
pub use inthread::{Delivery, in_thread};
pub use kiobuf::{Arena, ExtentInfo, ExtentKind, Kiobuf, LockWait, PageLock};
/// The crate whose stores an [`ObjectSource`] reads.
#[cfg(feature = "object-store")]
pub use object_store;
pub use page::page_size;
#[doc(hidden)]
pub use publish::fuzzing;
pub use publish::{
    Access, CLIENT_AREAS_MAX, Client, ClientOptions, ConnectFault, PeerCredentials, PublishOptions, Published,
};
pub use region::{AttachOptions, PopulateEnd, PopulateOptions, PopulateProgress, Populating, Region, Sharing};
pub use runtime::around::{FAULT_AROUND_MAX_PAGES, FaultAround};
pub use runtime::crew::HANDLERS_MAX;
pub use runtime::engine::{Engine, EngineBuilder, Shutdown};
pub use runtime::placement::Placement;
pub use runtime::stripes::STRIPES_MAX;
pub use runtime::workers::WORKERS_MAX;
pub use snapshot::{AreaSnapshot, Snapshot, SpaceSnapshot, VmapSnapshot};
pub use source::file::{FileOptions, FileSource};
#[cfg(feature = "object-store")]
pub use source::object::{ObjectOptions, ObjectSource};
pub use source::reader::{FnSource, ReadSource};
#[cfg(feature = "zstd")]
pub use source::zstd::{MadeImage, ZstdImage, ZstdOptions};
pub use source::{GRANULE_MAX_BYTES, PageSource};
pub use stats::latency::FaultLatency;
pub use stats::{SpaceStats, Stats, VmapStats};
pub use sys::{
    Features, Ioctls, MemoryKind, Named, OpenAttempt, OpenFailure, OpenStep, OpenWay, Probe, probe, probe_way,
    range_ioctls,
};
pub use vmap::failure::{FailureCause, FailurePolicy, ReadFailed};
pub use vmap::fill::FillProgress;
pub use vmap::object::Backing;
pub use vmap::page_size::PageSize;
pub use vmap::residency::Residency;
pub use vmap::{Revoke, Vmap, VmapBuilder};
pub use working_set::{WorkingSet, WorkingSetFault};

/// The example of the README, compiled and run as a test.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
pub struct Readme;
