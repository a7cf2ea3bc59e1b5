//! What is printed: what was done, what it took, and how that compares.

use kiomap::page_size;
use serde_json::{Value, json};

use crate::Options;
use crate::heap::{Known, Work};
use crate::restore::{EAGER_THREADS, How, Outcome};

pub(crate) struct Report<'a> {
    pub(crate) options: &'a Options,
    pub(crate) known: &'a Known,
    pub(crate) image_bytes: u64,
    pub(crate) set_bytes: u64,
    pub(crate) outcomes: &'a [Outcome],
}

impl Report<'_> {
    fn of(&self, how: How) -> &Outcome {
        self.outcomes.iter().find(|outcome| outcome.how == how).expect("each way was gone")
    }

    /// Time to the first result, lazily, as a share of what reading everything first takes.
    fn cold_to_eager(&self) -> f64 {
        self.of(How::Cold).first_result_ms / self.of(How::Eager).first_result_ms
    }

    /// And with the recorded set, as a share of without.
    fn replayed_to_cold(&self) -> f64 {
        self.of(How::Replayed).first_result_ms / self.of(How::Cold).first_result_ms
    }

    fn nr_pages(&self) -> u64 {
        self.known.len_bytes.div_ceil(page_size() as u64)
    }

    /// What was done about the storage.
    fn storage(&self) -> String {
        let Options { latency_ms, bandwidth_mb, direct, .. } = self.options;
        let what = match (&self.options.url, direct) {
            (Some(url), _) => format!("the object {url}"),
            (None, true) => "a file, read past the page cache (O_DIRECT)".into(),
            (None, false) => "a file, whose cached pages were dropped before each restore (posix_fadvise)".into(),
        };
        let mut simulated = Vec::new();
        if *latency_ms > 0.0 {
            simulated.push(format!("{latency_ms} ms a read"));
        }
        if *bandwidth_mb > 0 {
            simulated.push(format!("{bandwidth_mb} MB/s for all reads together"));
        }
        let simulated = if simulated.is_empty() { "nothing".into() } else { simulated.join(", ") };
        format!("{what}; simulated: {simulated}")
    }

    pub(crate) fn json(&self) -> Value {
        let kind = self.options.kind;
        json!({
            "image": { "kind": kind, "bytes": self.image_bytes, "heap_bytes": self.known.len_bytes, "pages": self.nr_pages() },
            "storage": self.storage(),
            "eager_threads": EAGER_THREADS,
            "replay_threads": self.options.replay_threads,
            "latency_ms": self.options.latency_ms,
            "bandwidth_mb": self.options.bandwidth_mb,
            "seed": self.options.seed,
            "working_set_share": self.known.touched_pages as f64 / self.nr_pages() as f64,
            "work": self.known.work,
            "touched_pages": self.known.touched_pages,
            "working_set_file_bytes": self.set_bytes,
            "restores": self.outcomes,
            "cold_to_eager": self.cold_to_eager(),
            "replayed_to_cold": self.replayed_to_cold(),
            "verified": true,
        })
    }

    pub(crate) fn text(&self) -> String {
        let Known { len_bytes, work, touched_pages, .. } = *self.known;
        let work = match work {
            Work::Lookups { number, .. } => format!("{number} lookups in a B-tree"),
            Work::Walk { steps, .. } => format!("{steps} steps through the bytes"),
        };
        let share = 100.0 * touched_pages as f64 / self.nr_pages() as f64;
        let mut text = format!(
            "heap      {} MiB, {} pages of {} bytes, seed {}; the image has {} MiB\n\
             request   {work}, each after the one before: {touched_pages} pages, {share:.1} %\n\
             storage   {}\n\
             threads   {EAGER_THREADS} read everything first, {} replay\n\n\
             {:<28}{:>14}{:>10}{:>10}{:>10}{:>12}\n",
            len_bytes >> 20,
            self.nr_pages(),
            page_size(),
            self.options.seed,
            self.image_bytes >> 20,
            self.storage(),
            self.options.replay_threads,
            "restore",
            "first result",
            "faults",
            "pages",
            "reads",
            "MiB read",
        );
        for outcome in self.outcomes {
            let name = match outcome.how {
                How::Eager => "everything first",
                How::Cold => "lazily",
                How::Replayed => "lazily, set replayed",
            };
            text += &format!(
                "{name:<28}{:>11.0} ms{:>10}{:>10}{:>10}{:>12.1}\n",
                outcome.first_result_ms,
                outcome.faults,
                outcome.pages,
                outcome.reads,
                outcome.bytes_read as f64 / f64::from(1 << 20)
            );
        }
        text += &format!(
            "\nlazily / everything first      {:.3}\nset replayed / lazily          {:.3}\n",
            self.cold_to_eager(),
            self.replayed_to_cold()
        );
        let set_pages = self.of(How::Cold).set_pages;
        text += &format!("the working set: {set_pages} pages that were faulted on, {} bytes\n", self.set_bytes);
        if self.outcomes.iter().any(|outcome| outcome.filled) {
            text += "the rest was brought in the background, the engine shut down, and the SHA-256 of all compared\n";
        }
        text + "verified: each restore gave the known answer\n"
    }
}
