//! What Firecracker says when it restores a snapshot whose memory somebody else pages in (`"backend_type": "Uffd"`).
//!
//! It connects to a Unix socket and sends one message: a JSON array that says which part of the memory file belongs at which of
//! its addresses, with the userfaultfd that these addresses are registered with. Nothing is answered. It keeps the socket open
//! until it exits, and of all events its userfaultfd reports REMOVE only: what its balloon gave back.
//!
//! ```no_run
//! use std::os::unix::net::UnixListener;
//! use std::time::{Duration, Instant};
//!
//! use kiomap::firecracker::{Handshake, Limits, check_against};
//! use kiomap::{AdoptOptions, Engine, Kiobuf};
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let file = std::fs::File::open("/run/vm/memory")?;
//! let mut list = Kiobuf::new();
//! list.map_sparse_file(&file)?;
//! let engine = Engine::new()?;
//! let memory = engine.vmap(&list)?;
//!
//! let listener = UnixListener::bind("/run/vm/pages.sock")?;
//! let (socket, _) = listener.accept()?;
//! let (areas, uffd) = match Handshake::receive(&socket, Instant::now() + Duration::from_secs(5), &Limits::new()) {
//!     Ok(handshake) => match check_against(&handshake.regions, list.length()) {
//!         Ok(()) => (handshake.areas(&memory), Some(handshake.uffd)),
//!         Err(fault) => {
//!             eprintln!("refused: {fault}");
//!             (Vec::new(), Some(handshake.uffd))
//!         }
//!     },
//!     Err(refused) => {
//!         eprintln!("refused: {refused}");
//!         (Vec::new(), refused.uffd)
//!     }
//! };
//! // Also that of a VM that is refused: if it were closed, its touches would wait for ever. Without areas they are SIGBUS.
//! if let Some(uffd) = uffd {
//!     let vm = engine.adopt(uffd, &areas, AdoptOptions::new())?;
//!     while !vm.wait_gone(Duration::from_secs(60)) {}
//! }
//! # Ok(())
//! # }
//! ```
//!
//! The example `firecracker_handler` is a whole handler made of it.

mod fault;
mod message;
mod receive;

use std::ops::Range;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::time::Instant;

use crate::{AdoptedArea, PageSize, Vmap};
pub use fault::{HandshakeFault, Refused};
pub use message::parse;

/// Bounds what a peer may send.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    message_bytes: usize,
    regions: usize,
}

impl Limits {
    /// Makes the usual limits: 64 KiB, 256 regions.
    pub fn new() -> Limits {
        Limits { message_bytes: 64 << 10, regions: 256 }
    }

    /// Sets the most bytes of a message, white space included.
    pub fn message_bytes(mut self, bytes: usize) -> Limits {
        self.message_bytes = bytes;
        self
    }

    /// Sets the most regions of a message.
    pub fn regions(mut self, regions: usize) -> Limits {
        self.regions = regions;
        self
    }
}

impl Default for Limits {
    fn default() -> Limits {
        Limits::new()
    }
}

/// Describes a range of a VM's memory, as its monitor has it mapped, and what belongs there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct GuestRegion {
    /// Where it begins in the monitor's address space: a multiple of its pages' size.
    pub base_host_virt_addr: usize,
    /// Its length: a multiple of its pages' size, not 0.
    pub size_bytes: usize,
    /// Where its first byte lies in the memory file: a multiple of its pages' size.
    pub offset_bytes: u64,
    /// The size of the pages there.
    pub page_size: PageSize,
}

impl GuestRegion {
    /// Returns its addresses.
    pub fn addrs(&self) -> Range<usize> {
        self.base_host_virt_addr..self.base_host_virt_addr + self.size_bytes
    }

    /// Returns the first of its pages in the list of the memory file, which counts base pages.
    pub fn pgoff(&self) -> u64 {
        self.offset_bytes / PageSize::Base.bytes() as u64
    }

    /// Returns the byte of the memory file that is the first behind it.
    fn end_in_file(&self) -> u64 {
        // As the message was parsed, this is no overflow.
        self.offset_bytes + self.size_bytes as u64
    }
}

/// Refuses regions that reach beyond a memory file of so many bytes.
///
/// # Errors
///
/// [`HandshakeFault::BeyondFile`].
pub fn check_against(regions: &[GuestRegion], memory_bytes: u64) -> Result<(), HandshakeFault> {
    match regions.iter().enumerate().find(|(_, region)| region.end_in_file() > memory_bytes) {
        Some((region, beyond)) => Err(HandshakeFault::BeyondFile { region, end: beyond.end_in_file(), memory_bytes }),
        None => Ok(()),
    }
}

/// Holds what a VM's monitor has sent: its memory, and the userfaultfd that reports the faults there.
#[derive(Debug)]
#[non_exhaustive]
pub struct Handshake {
    /// The regions, in the order of the message. No two of them share an address.
    pub regions: Vec<GuestRegion>,
    /// The first descriptor of the message: a userfaultfd. Whether its maker has made its handshake is not checked yet.
    pub uffd: OwnedFd,
}

impl Handshake {
    /// Receives a message, in however many pieces it comes, until `deadline`.
    ///
    /// The descriptor comes with its first bytes; all others are closed by the kernel. One that is no userfaultfd, as `/proc`
    /// names it, is closed by a thread for that: a file system of the peer's own can't make anybody wait. What the peer sends later
    /// is not read. The socket must not be one that has more with its messages (`SO_PASSCRED`): there is room for the descriptor only.
    ///
    /// # Errors
    ///
    /// [`Refused`] says why, and gives back a userfaultfd that had come: when it is closed, nobody answers the faults of
    /// whoever sent it.
    pub fn receive(socket: &UnixStream, deadline: Instant, limits: &Limits) -> Result<Handshake, Refused> {
        receive::receive(socket, deadline, limits)
    }

    /// Returns what [`Engine::adopt`](crate::Engine::adopt) is to serve: each region with its part of a vmap of the memory file.
    pub fn areas(&self, memory: &Vmap) -> Vec<AdoptedArea> {
        let area =
            |region: &GuestRegion| AdoptedArea::new(region.addrs(), memory, region.pgoff()).page_size(region.page_size);
        self.regions.iter().map(area).collect()
    }
}
