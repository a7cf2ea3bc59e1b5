//! What a list of a terabyte costs: to build, to attach, in memory, and per fault.

use std::cell::RefCell;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::rc::Rc;
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use kiomap::{AttachOptions, Engine, Kiobuf, page_size};

use crate::common::numbers::shuffle;
use crate::common::raw::Mapping;
use crate::common::touch::{Contents, mark};
use crate::counting::allocated_bytes;
use crate::memory::{Place, Served, begin, timed};
use crate::series::{Bench, Group, Sample, Series};

const GIB: u64 = 1 << 30;
const SIZES: [(&str, u64); 4] = [("1g", GIB), ("16g", 16 * GIB), ("256g", 256 * GIB), ("1t", 1024 * GIB)];

/// Touched pages lie in so many runs, spread evenly over the list: page tables are then few, however long it is.
const RUNS: usize = 16;

/// A sparse file of a terabyte. Pages that are touched hold their marks, for each of the sizes.
struct Sparse {
    file: File,
    bytes: u64,
}

/// The pages that are touched of a list of so many bytes.
fn touched(bytes: u64, pages: usize) -> Vec<usize> {
    let all = bytes as usize / page_size();
    (0..pages).map(|n| all / RUNS * (n % RUNS) + n / RUNS).collect()
}

impl Sparse {
    fn new(pages: usize) -> Result<Sparse> {
        let file = tempfile::tempfile().context("a temporary file")?;
        let biggest = SIZES.iter().rev().map(|size| size.1).find(|&bytes| file.set_len(bytes).is_ok());
        let bytes = biggest.context("a sparse file of a GiB")?;
        for size in SIZES.iter().map(|size| size.1).filter(|&size| size <= bytes) {
            for page in touched(size, pages) {
                let words = vec![mark(page); page_size() / size_of::<u64>()];
                let words: Vec<u8> = words.into_iter().flat_map(u64::to_ne_bytes).collect();
                file.write_all_at(&words, (page * page_size()) as u64).context("filling a sparse file")?;
            }
        }
        Ok(Sparse { file, bytes })
    }

    fn list(&self, bytes: u64) -> Result<Kiobuf> {
        ensure!(bytes <= self.bytes, "the file system has no sparse files of {bytes} bytes");
        let mut list = Kiobuf::new();
        list.map_file(&self.file, 0..bytes)?;
        Ok(list)
    }
}

/// Memory of this process: resident pages and page tables, as the kernel counts them exactly, and what is allocated.
fn memory() -> Result<f64> {
    let kib = |path: &str, field: &str| -> Result<f64> {
        let text = std::fs::read_to_string(path).with_context(|| format!("reading {path}"))?;
        let line =
            text.lines().find_map(|line| line.strip_prefix(field)).with_context(|| format!("{field} of {path}"))?;
        line.trim().trim_end_matches(" kB").parse().with_context(|| format!("{field} of {path}"))
    };
    Ok((kib("/proc/self/smaps_rollup", "Rss:")? + kib("/proc/self/status", "VmPTE:")?) * 1024.0)
}

pub(crate) fn group(bench: &Bench) -> Result<Group> {
    let pages = bench.extent(4096, 512);
    // Made when the first series needs it.
    let sparse: Rc<RefCell<Option<Sparse>>> = Rc::default();
    let with_file = move |work: &dyn Fn(&Sparse) -> Result<Sample>| {
        let mut sparse = sparse.borrow_mut();
        if sparse.is_none() {
            *sparse = Some(Sparse::new(pages)?);
        }
        work(sparse.as_ref().context("the file was just made")?)
    };
    let lives = bench.extent(20, 5);
    let mut series = Vec::new();
    for (name, bytes) in SIZES {
        let steps = [
            ("list_and_vmap", "building the list and the vmap", 0),
            ("attach", "attaching a region of all of it", 1),
            ("detach", "dropping the region", 2),
        ];
        for (step, about, which) in steps {
            let about = format!("{about}, {} GiB", bytes / GIB);
            let with_file = with_file.clone();
            series.push(Series::new(format!("attach_{name}_{step}"), about, lives, move |bench, _| {
                with_file(&|sparse| {
                    begin(bench, Place::Free)?;
                    let engine = Engine::new()?;
                    let mut each_ns = Vec::with_capacity(lives);
                    for _ in 0..lives {
                        let mut moments = [Instant::now(); 4];
                        let vmap = engine.vmap(&sparse.list(bytes)?)?;
                        moments[1] = Instant::now();
                        let region = vmap.attach(&AttachOptions::new())?;
                        moments[2] = Instant::now();
                        drop(region);
                        moments[3] = Instant::now();
                        each_ns.push((moments[which + 1] - moments[which]).as_nanos() as f64);
                    }
                    each_ns.sort_unstable_by(f64::total_cmp);
                    Ok(Sample { each_ns, ..Sample::default() })
                })
            }));
        }
        let about = format!("memory that list, vmap and region take before the first touch, {} GiB", bytes / GIB);
        let with_file = with_file.clone();
        series.push(Series::new(
            format!("attach_{name}_memory"),
            about,
            (bytes / page_size() as u64) as usize,
            move |bench, _| {
                with_file(&|sparse| {
                    begin(bench, Place::Free)?;
                    let engine = Engine::new()?;
                    // What the first one makes the engine keep is the engine's.
                    drop(engine.vmap(&sparse.list(bytes)?)?.attach(&AttachOptions::new())?);
                    engine.settle()?;
                    let (before, allocated) = (memory()?, allocated_bytes());
                    let vmap = engine.vmap(&sparse.list(bytes)?)?;
                    let region = vmap.attach(&AttachOptions::new())?;
                    let resident = memory()? - before;
                    let allocated = allocated_bytes() - allocated;
                    drop(region);
                    Ok(Sample { bytes: Some(resident.max(allocated as f64)), ..Sample::default() })
                })
            },
        ));
    }
    for (name, bytes) in [SIZES[0], SIZES[3]] {
        let order = move |repetition: usize| {
            let mut order = touched(bytes, pages);
            shuffle(&mut order, repetition as u64 + 1);
            order
        };
        let native = format!("attach_{name}_fault_native");
        let about = format!("the kernel's first touch of a shared memfd of {} GiB", bytes / GIB);
        series.push(
            Series::new(&native, about, pages, move |bench, repetition| {
                begin(bench, Place::Free)?;
                let fd = crate::common::raw::memfd(bytes as usize / page_size())?;
                let memory = Mapping::of(Some(&fd), bytes as usize)?;
                timed(bench, memory.as_ptr().expose_provenance(), &order(repetition), Contents::Zeros)
            })
            .native(&native),
        );
        let with_file = with_file.clone();
        let about = format!("a fault in the list of {} GiB, one page a fault", bytes / GIB);
        series.push(
            Series::new(format!("attach_{name}_fault"), about, pages, move |bench, repetition| {
                with_file(&|sparse| {
                    begin(bench, Place::Free)?;
                    let builder = Engine::builder().fault_around_pages(1);
                    let served = Served::new(builder, &sparse.list(bytes)?)?;
                    let sample = timed(bench, served.base(), &order(repetition), Contents::Marks)?;
                    served.finish()?;
                    Ok(sample)
                })
            })
            .native(&native),
        );
    }
    let repetitions = bench.extent(5, 2);
    Ok(Group { name: "attach", title: "Lists up to a terabyte", unit: "call or fault", repetitions, series })
}
