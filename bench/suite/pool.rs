//! The system's pool of huge pages, raised while it is needed.

use std::cell::Cell;

use anyhow::{Context, Result, ensure};
use nix::sys::memfd::{MFdFlags, memfd_create};

use crate::common::raw::Mapping;

const POOL: &str = "/sys/kernel/mm/hugepages/hugepages-2048kB";
const HUGE_BYTES: usize = 2 << 20;

fn read(name: &str) -> Result<usize> {
    let path = format!("{POOL}/{name}");
    let text = std::fs::read_to_string(&path).with_context(|| format!("reading {path}"))?;
    text.trim().parse().with_context(|| format!("{path} is no number"))
}

fn write(pages: usize) -> Result<()> {
    let path = format!("{POOL}/nr_hugepages");
    std::fs::write(&path, pages.to_string()).with_context(|| format!("writing {path}"))
}

/// So many huge pages are free; the pool has its size back when this ends.
pub(crate) struct Pool {
    before: Option<usize>,
    bytes: usize,
    warm: Cell<bool>,
}

impl Pool {
    /// Provides huge pages of 2 MiB for so many bytes, at least.
    pub(crate) fn with(bytes: usize) -> Result<Pool> {
        let needed = bytes.div_ceil(HUGE_BYTES);
        let there = || Ok::<usize, anyhow::Error>(read("free_hugepages")?.saturating_sub(read("resv_hugepages")?));
        let missing = needed.saturating_sub(there()?);
        if missing == 0 {
            return Ok(Pool { before: None, bytes: needed * HUGE_BYTES, warm: Cell::new(false) });
        }
        let before = read("nr_hugepages")?;
        write(before + missing)?;
        let pool = Pool { before: Some(before), bytes: needed * HUGE_BYTES, warm: Cell::new(false) };
        ensure!(there()? >= needed, "the kernel has no {needed} huge pages of 2 MiB");
        Ok(pool)
    }

    /// Touches the pages once, so that a virtual machine's host has allocated them.
    pub(crate) fn warm(&self) -> Result<()> {
        if !self.warm.replace(true) {
            let fd = memfd_create(c"pool", MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_HUGETLB | MFdFlags::MFD_HUGE_2MB)?;
            nix::unistd::ftruncate(&fd, self.bytes as i64).context("sizing a memfd of huge pages")?;
            let memory = Mapping::of(Some(&fd), self.bytes)?;
            for at in (0..self.bytes).step_by(HUGE_BYTES) {
                // SAFETY: the byte lies within the mapping, which nobody else knows; the pool has a page for it.
                unsafe { memory.as_ptr().add(at).write_volatile(1) };
            }
        }
        Ok(())
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        if let Some(before) = self.before
            && let Err(error) = write(before)
        {
            eprintln!("the pool of huge pages stays as it is: {error:#}");
        }
    }
}
