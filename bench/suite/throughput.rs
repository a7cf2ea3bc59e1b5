//! Touching all of a large region, in several orders.

use std::rc::Rc;

use anyhow::Result;
use kiomap::{Backing, Delivery, Engine, EngineBuilder, Kiobuf, PageSize, VmapBuilder, page_size};

use crate::common::floor::{Floor, With};
use crate::common::numbers::{Xorshift, shuffle};
use crate::common::raw::{Mapping, Memory, Waiting, memfd};
use crate::common::touch::Contents;
use crate::memory::{Access, Place, Served, begin, list, touch_all, whole};
use crate::pool::Pool;
use crate::series::{Bench, Group, Series};

/// In which order pages are touched.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Order {
    Sequential,
    Random,
    Strided,
    Zipf,
}

/// Pages from one touch to the next of the strided order.
const STRIDE: usize = 7;

impl Order {
    const ALL: [Order; 4] = [Order::Sequential, Order::Random, Order::Strided, Order::Zipf];

    fn prefix(self) -> &'static str {
        match self {
            Order::Sequential => "seq",
            Order::Random => "random",
            Order::Strided => "strided",
            Order::Zipf => "zipf",
        }
    }

    fn about(self) -> String {
        match self {
            Order::Sequential => "ascending".to_owned(),
            Order::Random => "in random order".to_owned(),
            Order::Strided => format!("every {STRIDE}th page, {STRIDE} times"),
            Order::Zipf => "as many random touches as pages, the k-th page with a weight of 1/k".to_owned(),
        }
    }

    fn pages(self, pages: usize, repetition: usize) -> Vec<usize> {
        let mut order: Vec<usize> = (0..pages).collect();
        match self {
            Order::Sequential => order,
            Order::Strided => (0..STRIDE).flat_map(|from| (from..pages).step_by(STRIDE)).collect(),
            Order::Random => {
                shuffle(&mut order, repetition as u64 + 1);
                order
            }
            Order::Zipf => {
                shuffle(&mut order, 1);
                let mut random = Xorshift::new(repetition as u64 + 1);
                // The inverse of the distribution's integral.
                let rank = |share: f64| ((pages as f64).powf(share) as usize).clamp(1, pages) - 1;
                (0..pages).map(|_| order[rank(random.share())]).collect()
            }
        }
    }
}

pub(crate) fn group(bench: &Bench) -> Group {
    let all = bench.extent(1 << 18, 1 << 15);
    let pool = Pool::with(all * page_size());
    if let Err(error) = &pool {
        eprintln!("series of huge pages are left out: {error:#}");
    }
    let pool = pool.ok().map(Rc::new);
    let series = Order::ALL.into_iter().flat_map(|order| of_order(order, all, pool.clone())).collect();
    let repetitions = bench.extent(7, 1);
    Group { name: "throughput", title: "Touching a large region", unit: "page", repetitions, series }
}

/// The fault-arounds that are swept.
const AROUND: [usize; 4] = [1, 16, 64, 512];

/// Makes a region of so many pages.
type Serve = Box<dyn Fn(&Bench, usize) -> Result<Served>>;
/// What is done before the touches, and part of the time.
type Before = fn(&Served) -> Result<()>;

/// A region of the source's pages.
fn served(build: impl Fn() -> EngineBuilder + 'static) -> Serve {
    Box::new(move |bench, pages| Served::new(build(), &list(&bench.source, pages)?))
}

/// A region of the source's pages, in huge ones.
fn huge_pages(pool: Rc<Pool>) -> Serve {
    Box::new(move |bench, pages| {
        pool.warm()?;
        let set = |vmap: VmapBuilder| vmap.page_size(PageSize::Huge2M);
        Served::published(Engine::builder(), &list(&bench.source, pages)?, set)
    })
}

/// A region that shows a memfd itself.
fn zero_copy(set: fn(VmapBuilder) -> VmapBuilder) -> Serve {
    Box::new(move |bench, pages| {
        let mut list = Kiobuf::new();
        list.map_memfd(bench.held(pages)?, 0..(pages * page_size()) as u64)?;
        Served::published(Engine::builder(), &list, |vmap| set(vmap.backing(Backing::Shared)))
    })
}

/// Pages that are held are mapped by the kernel.
fn natively(vmap: VmapBuilder) -> VmapBuilder {
    vmap
}

fn of_order(order: Order, all: usize, pool: Option<Rc<Pool>>) -> Vec<Series> {
    let name = |subject: &str| format!("{}_{subject}", order.prefix());
    let about = |subject: &str| format!("{subject}; {}", order.about());
    let native = |subject: &str, what: &str, filled: bool, access: Access| {
        Series::new(name(subject), about(what), all, move |bench, repetition| {
            begin(bench, Place::Free)?;
            let order = order.pages(all, repetition);
            let fd = memfd(all)?;
            if filled {
                // By another mapping, so that the one that is measured has no page tables.
                let other = Mapping::of(Some(&fd), all * page_size())?;
                touch_all(other.as_ptr().expose_provenance(), &Order::Sequential.pages(all, 0), Contents::Zeros);
            }
            let memory = Mapping::of(Some(&fd), all * page_size())?;
            whole(memory.as_ptr().expose_provenance(), &order, Contents::Zeros, access, || Ok(()))
        })
        .native(name("native_memfd"))
    };
    // Where every touch is a fault of a page of its own, an eighth of the region takes long enough.
    let some = move |around: usize| if around == 1 { all / 8 } else { all };
    let floor_with = |subject: String, with: With, around: usize| {
        let pages = some(around);
        let ioctl = if let With::Continue(_) = with { ", UFFDIO_CONTINUE of a filled memfd" } else { "" };
        let what = format!("bare loop, {around} pages a fault{ioctl}, on the processor that touches");
        Series::new(name(&subject), about(&what), pages, move |bench, repetition| {
            begin(bench, Place::Pinned)?;
            let order = order.pages(pages, repetition);
            let source = bench.source.clone();
            let floor = Floor::start(Memory::Memfd, Waiting::Read, with, pages, source, bench.way, None)?;
            let sample = whole(floor.base(), &order, Contents::Marks, Access::Write, || Ok(()))?;
            floor.finish()?;
            Ok(sample)
        })
        .native(name("native_memfd"))
    };
    let floor = |around: usize| floor_with(format!("floor_{around}"), With::Copy(around), around);
    let engine_by = |access: Access, subject: &str, what: &str, pages: usize, serve: Serve, before: Before| {
        Series::new(name(subject), about(what), pages, move |bench, repetition| {
            begin(bench, Place::Free)?;
            let order = order.pages(pages, repetition);
            let served = serve(bench, pages)?;
            let sample = whole(served.base(), &order, Contents::Marks, access, || before(&served))?;
            served.finish()?;
            Ok(sample)
        })
        .native(name("native_memfd"))
    };
    let engine = |subject: &str, what: &str, pages: usize, serve: Serve, before: Before| {
        engine_by(Access::Write, subject, what, pages, serve, before)
    };
    let nothing: Before = |_| Ok(());
    let mut series = vec![
        native("native_memfd", "the kernel's first touch of a shared memfd", false, Access::Write),
        native("native_resident", "the kernel's mapping of a memfd that is filled already", true, Access::Write),
        floor(1),
        floor(16),
    ];
    if order == Order::Sequential {
        series.extend([floor(64), floor(512)]);
        let held = |around: usize| floor_with(format!("floor_continue_{around}"), With::Continue(around), around);
        series.extend([held(16), held(512)]);
    }
    let default = "the engine as it is by default";
    series.push(engine("engine_default", default, all, served(Engine::builder), nothing));
    if let Some(pool) = pool {
        let what = "the engine as it is by default, of a vmap of 2 MiB pages";
        series.push(engine("engine_2m", what, all, huge_pages(pool), nothing));
    }
    let what = "the engine with in-thread delivery";
    let in_thread = served(|| Engine::builder().delivery(Delivery::InThread));
    series.push(engine("engine_in_thread", what, all, in_thread, nothing));
    if order == Order::Sequential {
        let populate: Before = |served| Ok(served.region.populate(0..served.region.len_bytes())?);
        let what = "`Region::populate`, and then the touches";
        series.push(engine("engine_populate", what, all, served(Engine::builder), populate));
        let what = "the same of a list that is a memfd";
        series.push(engine("engine_zero_copy_populate", what, all, zero_copy(natively), populate));
    }
    let what = "the engine as it is by default, of a list that is a memfd (`Kiobuf::map_memfd`)";
    series.push(engine("engine_zero_copy", what, all, zero_copy(natively), nothing));
    if matches!(order, Order::Sequential | Order::Random) {
        let minor = "the same with `VmapBuilder::minor_faults`";
        series.push(engine("engine_zero_copy_minor", minor, all, zero_copy(VmapBuilder::minor_faults), nothing));
    }
    if order == Order::Sequential {
        let read = |subject: &str, what: &str, serve: Serve| {
            let what = format!("{what}, by reads");
            let series = engine_by(Access::Read, subject, &what, all, serve, nothing);
            series.native(name("native_memfd_read"))
        };
        let by_kernel = |subject: &str, what: &str, filled: bool| {
            native(subject, what, filled, Access::Read).native(name("native_memfd_read"))
        };
        series.extend([
            by_kernel("native_memfd_read", "the kernel's first touch of a shared memfd, by reads", false),
            by_kernel("native_resident_read", "the kernel's mapping of a memfd that is filled already, by reads", true),
            read("engine_default_read", default, served(Engine::builder)),
            read("engine_zero_copy_read", what, zero_copy(natively)),
        ]);
    }
    for around in AROUND {
        let what = format!("the engine, {around} pages a fault");
        let serve = served(move || Engine::builder().fault_around_pages(around));
        let engine = engine(&format!("engine_around_{around}"), &what, some(around), serve, nothing);
        let floor = format!("floor_{around}");
        let has_floor = series.iter().any(|series| series.name == name(&floor));
        series.push(if has_floor { engine.floor(name(&floor)) } else { engine });
    }
    series
}
