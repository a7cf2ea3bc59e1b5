//! What the benchmarks share: the clock, the kernel's interface by hand, touches, the machine, documents.
#![allow(dead_code, reason = "each benchmark uses a part of it")]

pub(crate) mod axis;
pub(crate) mod clock;
pub(crate) mod document;
pub(crate) mod floor;
pub(crate) mod life;
pub(crate) mod machine;
pub(crate) mod numbers;
pub(crate) mod raw;
pub(crate) mod record;
pub(crate) mod source;
pub(crate) mod touch;
pub(crate) mod watch;
