//! What is printed: a line for each thing that happens, for people or as JSON.

use std::fmt::Display;
use std::io::{Write, stdout};
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use kiomap::{Engine, SpaceStats, Vmap};
use serde_json::{Value, json};

use crate::peer::Peer;

/// How serving a VM ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum End {
    /// Its process has ended.
    Gone,
    /// All its pages were brought; it goes on by itself.
    Released,
    /// It goes on by itself; what was missing is SIGBUS.
    Poisoned,
    /// It was killed, as the handler was to end at once.
    Killed,
    /// It could not be let go.
    Stuck,
}

impl End {
    fn name(self) -> &'static str {
        match self {
            End::Gone => "gone",
            End::Released => "released",
            End::Poisoned => "poisoned",
            End::Killed => "killed",
            End::Stuck => "stuck",
        }
    }
}

pub(crate) struct Report {
    json: bool,
    begun: AtomicU64,
    refused: AtomicU64,
}

impl Report {
    pub(crate) fn new(json: bool) -> Report {
        Report { json, begun: AtomicU64::new(0), refused: AtomicU64::new(0) }
    }

    /// Prints a line. That nobody reads them is no reason not to serve.
    fn line(&self, value: &Value, text: &str) {
        let line = if self.json { value.to_string() } else { text.to_owned() };
        let _ = writeln!(stdout().lock(), "{line}");
    }

    pub(crate) fn listening(&self, socket: &Path, memory: &Path, memory_bytes: u64) {
        let (socket, memory) = (socket.to_string_lossy(), memory.to_string_lossy());
        let mib = memory_bytes >> 20;
        self.line(
            &json!({ "event": "listening", "socket": socket, "memory": memory, "memory_bytes": memory_bytes }),
            &format!("listening at {socket}, for VMs with the {mib} MiB of {memory}"),
        );
    }

    pub(crate) fn begin(&self, peer: &Peer, nr_regions: usize, bytes: u64) {
        self.begun.fetch_add(1, Ordering::Relaxed);
        let Peer { number, pid, uid, .. } = peer;
        self.line(
            &json!({ "event": "begin", "vm": number, "pid": pid, "uid": uid, "regions": nr_regions, "bytes": bytes }),
            &format!("vm {number}: process {pid} of uid {uid}, {} MiB in {nr_regions} regions", bytes >> 20),
        );
    }

    pub(crate) fn refused(&self, peer: &Peer, why: &dyn Display) {
        self.refused.fetch_add(1, Ordering::Relaxed);
        let Peer { number, pid, uid, .. } = peer;
        self.line(
            &json!({ "event": "refused", "vm": number, "pid": pid, "uid": uid, "why": why.to_string() }),
            &format!("vm {number}: process {pid} of uid {uid} is refused: {why}"),
        );
    }

    /// Says that pages came before they were touched.
    pub(crate) fn brought(&self, peer: &Peer, how: &str, pages: u64, pages_failed: u64) {
        let number = peer.number;
        self.line(
            &json!({ "event": how, "vm": number, "pages": pages, "pages_failed": pages_failed }),
            &format!("vm {number}: {how}, {pages} pages; {pages_failed} can't be had"),
        );
    }

    pub(crate) fn hung_up(&self, peer: &Peer) {
        let number = peer.number;
        self.line(
            &json!({ "event": "hung_up", "vm": number }),
            &format!("vm {number}: has hung up; it is served until it ends"),
        );
    }

    /// The numbers are those of a second before its end, or later.
    pub(crate) fn end(&self, peer: &Peer, how: End, lived: Duration, numbers: Option<SpaceStats>) {
        let (number, how, seconds) = (peer.number, how.name(), lived.as_secs_f64());
        let [faults, pages_installed, pages_poisoned] =
            numbers.map_or([0; 3], |now| [now.faults, now.pages_installed, now.pages_poisoned]);
        self.line(
            &json!({
                "event": "end", "vm": number, "pid": peer.pid, "how": how, "seconds": seconds, "faults": faults,
                "pages_installed": pages_installed, "pages_poisoned": pages_poisoned,
            }),
            &format!(
                "vm {number}: {how} after {seconds:.1} s; {faults} faults, {pages_installed} pages installed, \
                 {pages_poisoned} refused"
            ),
        );
    }

    /// Says that something went wrong that the handler survives.
    pub(crate) fn trouble(&self, what: &str) {
        self.line(&json!({ "event": "trouble", "what": what }), what);
    }

    pub(crate) fn total(&self, engine: &Engine, vmap: &Vmap) {
        let stats = engine.stats();
        let latency = engine.fault_latency();
        let us = |quantile: Option<Duration>| quantile.map(|time| time.as_secs_f64() * 1e6);
        let (p50, p99) = (us(latency.p50()), us(latency.p99()));
        let (begun, refused) = (self.begun.load(Ordering::Relaxed), self.refused.load(Ordering::Relaxed));
        let recorded = vmap.working_set().ok().map(|set| set.pages().len());
        self.line(
            &json!({
                "event": "total", "vms": begun, "refused": refused, "faults": stats.faults,
                "pages_copied": stats.pages_copied, "pages_zeroed": stats.pages_zeroed,
                "pages_poisoned": stats.pages_poisoned, "source_errors": stats.source_errors,
                "bytes_installed": stats.bytes_installed(), "panics": stats.panics, "events": stats.events,
                "fault_p50_us": p50, "fault_p99_us": p99, "recorded_pages": recorded,
            }),
            &format!(
                "{begun} VMs were served, {refused} refused; {} faults, {} pages copied, {} of zeros, {} refused",
                stats.faults, stats.pages_copied, stats.pages_zeroed, stats.pages_poisoned
            ),
        );
    }
}
