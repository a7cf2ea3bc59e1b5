//! What is measured: the list of series, their names, and what each is compared with.

use crate::common::raw::{Memory, Waiting};
use crate::common::touch::Contents;

/// Who answers the faults.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Subject {
    /// The kernel, without any userfaultfd.
    Native(Memory),
    /// A bare loop of read and ioctl.
    Floor(Memory, Waiting),
    /// The engine.
    Engine,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Order {
    Random,
    Sequential,
}

/// Which processors touching and fault-handling threads run on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Placement {
    /// All on one.
    SameCore,
    /// Wherever the scheduler likes.
    Unpinned,
    /// Two touching threads, each on a core of its own; the handler wherever the scheduler likes.
    TwoThreads,
}

/// One series. Its name follows from the rest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Series {
    pub(crate) subject: Subject,
    pub(crate) contents: Contents,
    /// Pages that a fault brings.
    pub(crate) around: usize,
    pub(crate) order: Order,
    pub(crate) placement: Placement,
    /// A forked child touches.
    pub(crate) child: bool,
}

impl Series {
    const fn new(subject: Subject, around: usize) -> Series {
        let contents = match subject {
            Subject::Native(_) => Contents::Zeros,
            Subject::Floor(..) | Subject::Engine => Contents::Marks,
        };
        let (order, placement) = (Order::Random, Placement::SameCore);
        Series { subject, contents, around, order, placement, child: false }
    }

    const fn native(memory: Memory) -> Series {
        Series::new(Subject::Native(memory), 1)
    }

    const fn floor(memory: Memory, around: usize) -> Series {
        Series::new(Subject::Floor(memory, Waiting::Read), around)
    }

    const fn engine(around: usize) -> Series {
        Series::new(Subject::Engine, around)
    }

    const fn sequential(self) -> Series {
        Series { order: Order::Sequential, ..self }
    }

    const fn placed(self, placement: Placement) -> Series {
        Series { placement, ..self }
    }

    const fn by_child(self) -> Series {
        Series { child: true, ..self }
    }

    const fn sigbus(self) -> Series {
        Series { contents: Contents::Nothing, ..self }
    }

    pub(crate) fn is_sigbus(&self) -> bool {
        self.contents == Contents::Nothing
    }

    /// The stable name.
    pub(crate) fn name(&self) -> String {
        let mut name = match self.subject {
            _ if self.is_sigbus() => match self.subject {
                Subject::Native(_) => "native_sigbus".to_owned(),
                Subject::Floor(..) => "floor_sigbus".to_owned(),
                Subject::Engine => "engine_sigbus".to_owned(),
            },
            Subject::Native(Memory::Anon) => "native_anon".to_owned(),
            Subject::Native(Memory::Memfd) => "native_memfd".to_owned(),
            Subject::Floor(Memory::Anon, _) => format!("floor_anon_{}", self.around),
            Subject::Floor(Memory::Memfd, _) => format!("floor_memfd_{}", self.around),
            Subject::Engine => format!("engine_{}", self.around),
        };
        if self.subject == Subject::Floor(Memory::Memfd, Waiting::Poll) {
            name += "_poll";
        }
        if self.order == Order::Sequential {
            name += "_seq";
        }
        name += match self.placement {
            Placement::SameCore => "",
            Placement::Unpinned => "_unpinned",
            Placement::TwoThreads => "_2threads",
        };
        if self.child {
            name += "_child";
        }
        name
    }

    /// The series that is this one's floor: same pages per fault, same order, same placement, blocking, on a memfd.
    pub(crate) fn floor_name(&self) -> Option<String> {
        let floor = Series { subject: Subject::Floor(Memory::Memfd, Waiting::Read), child: false, ..*self };
        (!matches!(self.subject, Subject::Native(_))).then(|| floor.name())
    }

    /// The series that is the kernel's own first touch of the same: on a memfd, same order. A placement other than two
    /// threads makes no difference to it.
    pub(crate) fn native_name(&self) -> String {
        let placement = if self.placement == Placement::TwoThreads { self.placement } else { Placement::SameCore };
        let subject = Subject::Native(Memory::Memfd);
        Series { subject, around: 1, placement, child: false, ..*self }.name()
    }

    /// Says in a sentence what it measures.
    pub(crate) fn about(&self) -> String {
        let page_or_pages = if self.around == 1 { "1 page".to_owned() } else { format!("{} pages", self.around) };
        let mut about = match self.subject {
            Subject::Native(Memory::Memfd) if self.is_sigbus() => "touch past the end of a memfd".to_owned(),
            Subject::Floor(..) if self.is_sigbus() => "bare loop of read and UFFDIO_POISON".to_owned(),
            Subject::Engine if self.is_sigbus() => "the engine, touch of a hole".to_owned(),
            Subject::Native(Memory::Anon) => "the kernel's first touch, anonymous private".to_owned(),
            Subject::Native(Memory::Memfd) => "the kernel's first touch, memfd shared".to_owned(),
            Subject::Floor(memory, waiting) => {
                let memory = if memory == Memory::Anon { "anonymous memory" } else { "a memfd" };
                let read = if waiting == Waiting::Poll { "poll, read" } else { "blocking read" };
                format!("bare loop of {read} and UFFDIO_COPY of {page_or_pages}, on {memory}")
            }
            Subject::Engine => format!("the engine, fault-around {}", self.around),
        };
        about += match self.order {
            Order::Random => "",
            Order::Sequential => ", sequential",
        };
        about += match self.placement {
            Placement::SameCore => "",
            Placement::Unpinned => ", threads not pinned",
            Placement::TwoThreads => ", two touching threads on two cores",
        };
        if self.child {
            about += ", touched by a forked child";
        }
        about
    }
}

/// All series, in the order of the report; what is compared stands side by side. Those that need two processors are
/// left out if there is only one.
pub(crate) fn all(two_cpus: bool) -> Vec<Series> {
    use Memory::{Anon, Memfd};
    use Placement::{TwoThreads, Unpinned};

    let mut list = vec![Series::native(Anon), Series::native(Memfd)];
    for around in [1, 16, 64] {
        list.extend([Series::floor(Anon, around), Series::floor(Memfd, around), Series::engine(around)]);
        if around < 64 {
            list.push(Series::engine(around).by_child());
        }
        if around == 1 {
            list.push(Series::new(Subject::Floor(Memfd, Waiting::Poll), around));
        }
    }
    let one = [Series::native(Anon), Series::native(Memfd)];
    list.extend(one.map(Series::sequential));
    for around in [1, 16, 64] {
        let group = [Series::floor(Anon, around), Series::floor(Memfd, around), Series::engine(around)];
        list.extend(group.map(Series::sequential));
    }
    list.extend([Series::native(Memfd), Series::floor(Memfd, 1), Series::engine(1)].map(Series::sigbus));
    if two_cpus {
        for around in [1, 16] {
            list.extend([Series::floor(Memfd, around), Series::engine(around)].map(|s| s.placed(Unpinned)));
        }
        list.push(Series::native(Memfd).placed(TwoThreads));
        for around in [1, 16] {
            list.extend([Series::floor(Memfd, around), Series::engine(around)].map(|s| s.placed(TwoThreads)));
        }
    }
    list
}
