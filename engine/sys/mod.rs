//! The kernel's interface: every system call on a userfaultfd, with errno turned into meaning once, here.
//!
//! The crate `userfaultfd` is the way in to register, unregister and wake. The handshake and the ioctls that
//! install pages are our own: version 0.9 reads COPY's count as unsigned, so that −EAGAIN passes for progress, and it
//! has no POISON. So is reading: the crate's may wait. Beside it, the futex that the engine's threads sleep on, and the clock. This module knows nothing of what the engine uses it for.

pub(crate) mod clock;
mod flags;
pub(crate) mod futex;
mod install;
mod message;
mod open;
mod probe;
#[cfg(test)]
mod testing;
mod uapi;
mod uffd;

pub use flags::{Features, Ioctls, Named};
pub(crate) use install::{Install, Stop};
pub(crate) use message::{FaultKind, Message, MsgBuffer};
pub(crate) use open::{DEFAULT_WAYS, Opener};
pub use open::{OpenAttempt, OpenFailure, OpenStep, OpenWay};
pub use probe::{MemoryKind, Probe, probe, probe_way, range_ioctls};
pub(crate) use uffd::{Liveness, Userfault};
