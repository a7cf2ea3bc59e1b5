//! Scripts: what a round does, as plain data. A script is made from a seed, written as lines of text, and stays one when
//! lines are left out: an operation on something that is not there does nothing.

use serde::{Deserialize, Serialize};

use crate::support::scene::Rng;

/// Vmaps of a round.
pub(crate) const VMAPS: usize = 6;
/// The most pages that a list can have.
pub(crate) const PAGES: usize = 96;
/// Processes at once: the engine's own is process 0.
pub(crate) const PROCESSES: usize = 12;
/// Pages of address space in which regions are attached, moved and overwritten.
pub(crate) const ARENA: usize = 320;

/// How the engine of a round is built.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Settings {
    pub(crate) around: usize,
    pub(crate) workers: usize,
    pub(crate) end: End,
}

/// How a round ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum End {
    /// Processes are killed, regions dropped, then the engine.
    Clean,
    /// The engine is shut down while all of it is there: what is missing is SIGBUS.
    Poison,
    /// The same, after everything that can be had was filled.
    Fill,
}

/// A round: settings, and what is done one after the other.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(crate) struct Script {
    pub(crate) settings: Settings,
    pub(crate) ops: Vec<Op>,
}

/// A part of a page list.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum Part {
    /// Owned bytes; so many are missing in the last page.
    Bytes {
        pages: usize,
        slack: usize,
    },
    /// Borrowed bytes that begin so far into the first page.
    Slice {
        pages: usize,
        head: usize,
    },
    File {
        pages: usize,
        slack: usize,
    },
    /// A source that may block; one of its pages may be bad.
    Source {
        pages: usize,
        bad: Option<usize>,
    },
    Zero {
        pages: usize,
    },
    Hole {
        pages: usize,
    },
}

impl Part {
    pub(crate) fn pages(self) -> usize {
        match self {
            Part::Bytes { pages, .. }
            | Part::Slice { pages, .. }
            | Part::File { pages, .. }
            | Part::Source { pages, .. }
            | Part::Zero { pages }
            | Part::Hole { pages } => pages,
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum Access {
    None,
    Read,
    Write,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum Advice {
    DontNeed,
    Cold,
    PageOut,
    Free,
    Remove,
    PopulateRead,
    PopulateWrite,
}

/// How a vmap is attached.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Attach {
    pub(crate) region: u32,
    pub(crate) vmap: usize,
    pub(crate) pgoff: u64,
    pub(crate) pages: usize,
    pub(crate) at: Option<usize>,
    pub(crate) writable: bool,
    pub(crate) inherit: bool,
    /// As many as there may be: of the pages, and 1 in a forked child.
    #[serde(default)]
    pub(crate) stripes: usize,
}

/// One step. `process` and `vmap` are slots; `region` is a number that is given once; `at` is a page of the arena.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(crate) enum Op {
    Vmap {
        vmap: usize,
        parts: Vec<Part>,
        expandable: bool,
    },
    Attach {
        process: usize,
        #[serde(flatten)]
        attach: Attach,
    },
    Drop {
        process: usize,
        region: u32,
    },
    Read {
        process: usize,
        at: usize,
        word: usize,
    },
    Write {
        process: usize,
        at: usize,
        word: usize,
        value: u64,
    },
    RegionRead {
        process: usize,
        region: u32,
        offset: usize,
        len: usize,
    },
    RegionWrite {
        process: usize,
        region: u32,
        offset: usize,
        len: usize,
        value: u8,
    },
    Atomic {
        process: usize,
        region: u32,
        word: usize,
        add: u64,
    },
    VmapRead {
        vmap: usize,
        offset: usize,
        len: usize,
    },
    VmapWrite {
        vmap: usize,
        offset: usize,
        len: usize,
        value: u8,
    },
    /// write(2) from the page into a pipe.
    PipeOut {
        process: usize,
        at: usize,
        word: usize,
    },
    /// read(2) from a pipe into the page.
    PipeIn {
        process: usize,
        at: usize,
        word: usize,
        value: u64,
    },
    Unmap {
        process: usize,
        at: usize,
        pages: usize,
    },
    /// Private memory of somebody else, mapped over whatever is there.
    Foreign {
        process: usize,
        at: usize,
        pages: usize,
        byte: u8,
    },
    Move {
        process: usize,
        at: usize,
        pages: usize,
        to: usize,
    },
    Shrink {
        process: usize,
        at: usize,
        pages: usize,
        by: usize,
    },
    /// Grows an area in place.
    Grow {
        process: usize,
        at: usize,
        by: usize,
    },
    /// Moves an area and leaves the old range mapped (`MREMAP_DONTUNMAP`).
    Double {
        process: usize,
        at: usize,
        to: usize,
    },
    Protect {
        process: usize,
        at: usize,
        pages: usize,
        access: Access,
    },
    Advise {
        process: usize,
        at: usize,
        pages: usize,
        advice: Advice,
    },
    Fork {
        process: usize,
        child: usize,
    },
    Exit {
        process: usize,
    },
    Kill {
        process: usize,
    },
    Exec {
        process: usize,
    },
    Spawn {
        process: usize,
    },
    Expand {
        vmap: usize,
        parts: Vec<Part>,
    },
    Revoke {
        vmap: usize,
        hard: bool,
    },
    /// Drops the engine process's handle.
    Forget {
        vmap: usize,
    },
    Check,
    Storm(Storm),
}

/// Threads of several processes that touch at random while others unmap, advise, attach, fork and are killed.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(crate) struct Storm {
    pub(crate) processes: Vec<usize>,
    pub(crate) seed: u64,
    pub(crate) touchers: usize,
    pub(crate) touches: u32,
    pub(crate) writes: bool,
    pub(crate) advice: Vec<Advice>,
    /// Unmaps of parts of regions, one after the other.
    pub(crate) cuts: usize,
    /// The pages are dropped right before.
    pub(crate) evict: bool,
    /// Attaches and drops.
    pub(crate) churns: u32,
    pub(crate) forks: u32,
    /// A signal every so many microseconds.
    pub(crate) timer: Option<u32>,
    /// One of the processes, which is killed in the middle.
    pub(crate) kill: Option<usize>,
}

impl Script {
    /// Writes a script as lines: the settings, then an operation on each.
    pub(crate) fn to_text(&self) -> String {
        let mut text = serde_json::to_string(&self.settings).unwrap();
        for op in &self.ops {
            text.push('\n');
            text.push_str(&serde_json::to_string(op).unwrap());
        }
        text.push('\n');
        text
    }

    pub(crate) fn from_text(text: &str) -> Result<Script, serde_json::Error> {
        let mut lines = text.lines().filter(|line| !line.trim().is_empty() && !line.starts_with('#'));
        let settings = serde_json::from_str(lines.next().unwrap_or_default())?;
        let ops = lines.map(serde_json::from_str).collect::<Result<_, _>>()?;
        Ok(Script { settings, ops })
    }
}

/// What the generator remembers, so that most operations meet something.
#[derive(Clone, Copy)]
struct Place {
    process: usize,
    region: u32,
    at: usize,
    pages: usize,
}

struct Generator {
    rng: Rng,
    places: Vec<Place>,
    alive: Vec<usize>,
    vmaps: Vec<(usize, usize)>,
    next_region: u32,
}

/// Makes the script of a round: the same for the same seed and number.
pub(crate) fn generate(seed: u64, round: u64) -> Script {
    let mut rng = Rng::new(stamp(seed, round));
    // The first numbers of seeds that are close are close.
    for _ in 0..8 {
        rng.next();
    }
    let end = pick(&mut rng, &[End::Clean, End::Poison, End::Fill]);
    let settings =
        Settings { around: pick(&mut rng, &[1, 1, 2, 4, 16, 64, 512]), workers: 1 + rng.below(3) as usize, end };
    let nr_ops = pick(&mut rng, &[60, 120, 250, 400]);
    // Each round likes other operations.
    let weights: Vec<u64> = KINDS.iter().map(|&(_, weight)| weight * pick(&mut rng, &[0, 1, 1, 2, 4])).collect();
    let mut generator = Generator { rng, places: Vec::new(), alive: vec![0], vmaps: Vec::new(), next_region: 0 };
    let mut ops = Vec::new();
    for _ in 0..1 + generator.below(3) {
        ops.extend(generator.vmap());
    }
    for _ in 0..1 + generator.below(4) {
        ops.extend(generator.attach());
    }
    let total: u64 = weights.iter().sum::<u64>().max(1);
    while ops.len() < nr_ops {
        let mut left = generator.rng.below(total);
        let kind = KINDS.iter().zip(&weights).find(|&(_, &weight)| {
            let found = left < weight;
            left = left.wrapping_sub(weight);
            found
        });
        let kind = kind.map_or(Kind::Touch, |(&(kind, _), _)| kind);
        ops.extend(generator.op(kind));
        if generator.below(40) == 0 {
            ops.push(Op::Check);
        }
    }
    Script { settings, ops }
}

#[derive(Clone, Copy)]
enum Kind {
    Touch,
    Write,
    Attach,
    Drop,
    Access,
    Owner,
    Pipe,
    Unmap,
    Foreign,
    Move,
    Second,
    Protect,
    Advise,
    Remove,
    Fork,
    End,
    Spawn,
    Vmap,
    Change,
    Storm,
}

const KINDS: &[(Kind, u64)] = &[
    (Kind::Touch, 40),
    (Kind::Write, 20),
    (Kind::Attach, 14),
    (Kind::Drop, 5),
    (Kind::Access, 10),
    (Kind::Owner, 4),
    (Kind::Pipe, 6),
    (Kind::Unmap, 10),
    (Kind::Foreign, 4),
    (Kind::Move, 8),
    (Kind::Second, 8),
    (Kind::Protect, 6),
    (Kind::Advise, 6),
    (Kind::Remove, 5),
    (Kind::Fork, 4),
    (Kind::End, 3),
    (Kind::Spawn, 1),
    (Kind::Vmap, 2),
    (Kind::Change, 1),
    (Kind::Storm, 2),
];

fn pick<T: Copy>(rng: &mut Rng, from: &[T]) -> T {
    from[rng.below(from.len() as u64) as usize]
}

impl Generator {
    fn below(&mut self, end: usize) -> usize {
        self.rng.below(end.max(1) as u64) as usize
    }

    fn chance(&mut self, one_in: usize) -> bool {
        self.below(one_in) == 0
    }

    fn process(&mut self) -> usize {
        let at = self.below(self.alive.len());
        self.alive[at]
    }

    /// Somewhere in the arena, most often in a region.
    fn spot(&mut self) -> (usize, usize) {
        if self.places.is_empty() || self.chance(12) {
            let process = self.process();
            return (process, self.below(ARENA));
        }
        let index = self.below(self.places.len());
        let place = self.places[index];
        (place.process, place.at + self.below(place.pages))
    }

    fn region(&mut self) -> Option<Place> {
        let index = self.below(self.places.len());
        self.places.get(index).copied()
    }

    fn parts(&mut self) -> Vec<Part> {
        if self.chance(4) {
            return vec![Part::Zero { pages: 1 + self.below(32) }];
        }
        let mut parts = Vec::new();
        let mut room = 48;
        for _ in 0..1 + self.below(5) {
            let most = if self.chance(3) { 20 } else { 5 };
            let pages = 1 + self.below(most);
            if pages > room {
                break;
            }
            room -= pages;
            let slack = if self.chance(2) { 0 } else { self.below(4096) };
            parts.push(match self.below(8) {
                0 | 1 => Part::Bytes { pages, slack },
                2 => Part::Slice { pages, head: slack },
                3 => Part::File { pages, slack },
                4 | 5 => Part::Source { pages, bad: self.chance(4).then(|| self.below(pages)) },
                6 => Part::Zero { pages },
                _ => Part::Hole { pages },
            });
        }
        parts
    }

    fn vmap(&mut self) -> Option<Op> {
        let vmap = self.vmaps.len();
        if vmap >= VMAPS {
            return None;
        }
        let parts = self.parts();
        self.vmaps.push((vmap, parts.iter().map(|part| part.pages()).sum()));
        Some(Op::Vmap { vmap, parts, expandable: self.chance(3) })
    }

    fn attach(&mut self) -> Option<Op> {
        let index = self.below(self.vmaps.len());
        let &(vmap, nr_pages) = self.vmaps.get(index)?;
        let process = self.process();
        let pgoff = if self.chance(2) { 0 } else { self.below(nr_pages + 2) };
        let pages = match self.below(4) {
            0 => 1 + self.below(4),
            1 => nr_pages + 2,
            2 => nr_pages.saturating_sub(pgoff).max(1),
            _ => 1 + self.below(nr_pages),
        };
        let at = self.below(ARENA - pages);
        let region = self.next_region;
        self.next_region += 1;
        let at = (!self.chance(10)).then_some(at);
        if let Some(at) = at {
            self.places.push(Place { process, region, at, pages });
        }
        let (writable, inherit) = (!self.chance(5), !self.chance(6));
        let stripes = if self.chance(3) { 1 + self.below(6) } else { 1 };
        let attach = Attach { region, vmap, pgoff: pgoff as u64, pages, at, writable, inherit, stripes };
        Some(Op::Attach { process, attach })
    }

    fn some_pages(&mut self) -> usize {
        1 + if self.chance(4) { self.below(40) } else { self.below(6) }
    }

    fn op(&mut self, kind: Kind) -> Option<Op> {
        let (process, at) = self.spot();
        let pages = self.some_pages();
        let word = self.below(512);
        let value = self.rng.next();
        Some(match kind {
            Kind::Touch => Op::Read { process, at, word },
            Kind::Write => Op::Write { process, at, word, value },
            Kind::Attach => return self.attach(),
            Kind::Drop => {
                let place = self.region()?;
                self.places.retain(|other| (other.process, other.region) != (place.process, place.region));
                Op::Drop { process: place.process, region: place.region }
            }
            Kind::Access => {
                let Place { process, region, pages, .. } = self.region()?;
                let offset = self.below(pages * 4096);
                let len = 1 + if self.chance(3) { self.below(9000) } else { self.below(40) };
                match self.below(3) {
                    0 => Op::RegionRead { process, region, offset, len },
                    1 => Op::RegionWrite { process, region, offset, len, value: value as u8 },
                    _ => Op::Atomic { process, region, word: offset / 8, add: value },
                }
            }
            Kind::Owner => {
                let vmap = self.below(self.vmaps.len());
                let offset = self.below(self.vmaps.get(vmap)?.1 * 4096);
                let len = 1 + if self.chance(3) { self.below(20000) } else { self.below(40) };
                if self.chance(2) {
                    Op::VmapRead { vmap, offset, len }
                } else {
                    Op::VmapWrite { vmap, offset, len, value: value as u8 }
                }
            }
            Kind::Pipe if self.chance(2) => Op::PipeOut { process, at, word },
            Kind::Pipe => Op::PipeIn { process, at, word, value },
            Kind::Unmap => Op::Unmap { process, at, pages },
            Kind::Foreign => Op::Foreign { process, at, pages, byte: 1 + value as u8 % 255 },
            Kind::Move if self.chance(4) => Op::Shrink { process, at, pages: pages + 1, by: 1 + self.below(pages) },
            Kind::Second if self.chance(2) => Op::Grow { process, at, by: pages },
            Kind::Second => Op::Double { process, at, to: self.below(ARENA) },
            Kind::Move => {
                let to = if self.chance(3) { self.spot().1 } else { self.below(ARENA) };
                if self.chance(2) {
                    self.places.push(Place { process, region: u32::MAX, at: to, pages });
                }
                Op::Move { process, at, pages, to }
            }
            Kind::Protect => {
                let access = pick(&mut self.rng, &[Access::None, Access::Read, Access::Write, Access::Write]);
                Op::Protect { process, at, pages, access }
            }
            Kind::Advise => {
                let advice = self.advice();
                Op::Advise { process, at, pages, advice }
            }
            Kind::Remove => Op::Advise { process, at, pages: pages + 8, advice: Advice::Remove },
            Kind::Fork => {
                let free = (1..PROCESSES).find(|process| !self.alive.contains(process))?;
                let process = self.process();
                self.alive.push(free);
                let inherited: Vec<Place> =
                    self.places.iter().filter(|place| place.process == process).copied().collect();
                self.places.extend(inherited.into_iter().map(|place| Place { process: free, ..place }));
                Op::Fork { process, child: free }
            }
            Kind::End => {
                let process = self.process();
                if process == 0 {
                    return None;
                }
                self.alive.retain(|&other| other != process);
                self.places.retain(|place| place.process != process);
                match self.below(4) {
                    0 => Op::Exec { process },
                    1 => Op::Exit { process },
                    _ => Op::Kill { process },
                }
            }
            Kind::Spawn => Op::Spawn { process: self.process() },
            Kind::Vmap => return self.vmap(),
            Kind::Change => {
                let vmap = self.below(self.vmaps.len());
                match self.below(6) {
                    0 => Op::Revoke { vmap, hard: true },
                    1 => Op::Revoke { vmap, hard: false },
                    2 => Op::Forget { vmap },
                    _ => Op::Expand { vmap, parts: self.parts() },
                }
            }
            Kind::Storm => return Some(self.storm()),
        })
    }

    fn advice(&mut self) -> Advice {
        use Advice::{Cold, DontNeed, Free, PageOut, PopulateRead, PopulateWrite, Remove};
        pick(&mut self.rng, &[DontNeed, DontNeed, Cold, PageOut, Free, Remove, PopulateRead, PopulateWrite])
    }

    fn storm(&mut self) -> Op {
        let mut processes = vec![self.process()];
        for _ in 0..self.below(3) {
            processes.push(self.process());
        }
        processes.sort_unstable();
        processes.dedup();
        let kill = if self.chance(3) { processes.iter().copied().find(|&process| process != 0) } else { None };
        if let Some(killed) = kill {
            self.alive.retain(|&other| other != killed);
            self.places.retain(|place| place.process != killed);
        }
        let mut advice = Vec::new();
        if self.chance(2) {
            for _ in 0..1 + self.below(8) {
                advice.push(self.advice());
            }
        }
        Op::Storm(Storm {
            processes,
            seed: self.rng.next(),
            touchers: 1 + self.below(3),
            touches: 50 + self.below(400) as u32,
            writes: self.chance(2),
            advice,
            cuts: if self.chance(2) { self.below(24) } else { 0 },
            evict: self.chance(2),
            churns: if self.chance(2) { self.below(12) as u32 } else { 0 },
            forks: if self.chance(3) { 1 + self.below(3) as u32 } else { 0 },
            timer: self.chance(3).then(|| 100 + self.below(200) as u32),
            kill,
        })
    }
}

/// Mixes two numbers into one that looks random.
pub(crate) fn stamp(a: u64, b: u64) -> u64 {
    let mut x = a.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ b.wrapping_add(0x2545_f491_4f6c_dd1d);
    x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}
