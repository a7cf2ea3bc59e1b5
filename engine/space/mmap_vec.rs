//! A growable vector that never asks the global allocator for memory.
//!
//! The thread that reads a userfaultfd must not allocate: another thread may hold the allocator's lock while it waits,
//! in a fork or an unmap, for that very reader. The storage here is an anonymous mapping of its own. Making one takes
//! only the kernel's lock of the address space, which the kernel gives back before it waits for an event to be read.

use std::ops::{Deref, DerefMut};
use std::ptr::{self, NonNull};

use memmap2::MmapMut;
use nix::errno::Errno;

use crate::page::page_size;

/// The smallest page that Linux has on any machine: each mapping is aligned to at least this many bytes.
const MIN_PAGE_BYTES: usize = 4096;

/// A vector whose elements lie in an anonymous mapping; indices that are out of bounds panic, as with a slice.
pub(crate) struct MmapVec<T> {
    /// The start of `map`, or dangling while there is none.
    ///
    /// Taken once, when the mapping is made: an element may have padding, so `map` is never again looked at as bytes.
    first: NonNull<T>,
    /// The elements that live in the mapping, from its start.
    len: usize,
    /// The elements that fit in it.
    capacity: usize,
    /// Held for its drop, which unmaps.
    map: Option<MmapMut>,
}

// SAFETY: the elements are owned through `first` alone, as a Vec owns its elements, and a mapping belongs to no thread.
unsafe impl<T: Send> Send for MmapVec<T> {}
// SAFETY: a shared MmapVec gives out nothing but shared references to its elements.
unsafe impl<T: Sync> Sync for MmapVec<T> {}

impl<T> MmapVec<T> {
    /// Makes an empty vector; it maps nothing until something is put in.
    pub(crate) const fn new() -> Self {
        const {
            assert!(size_of::<T>() != 0, "elements without a size need no memory");
            assert!(align_of::<T>() <= MIN_PAGE_BYTES, "a mapping is aligned to a page, and no further");
        }
        MmapVec { first: NonNull::dangling(), len: 0, capacity: 0, map: None }
    }

    /// Makes room for `additional` more elements, so that putting them in can't fail.
    ///
    /// # Errors
    ///
    /// What mmap(2) answers: `ENOMEM` when memory, the address space or `vm.max_map_count` is used up. Nothing changed.
    #[inline]
    pub(crate) fn try_reserve(&mut self, additional: usize) -> Result<(), Errno> {
        let needed = self.len.checked_add(additional).ok_or(Errno::ENOMEM)?;
        if needed <= self.capacity { Ok(()) } else { self.grow(needed) }
    }

    /// Puts `element` at the end.
    ///
    /// # Errors
    ///
    /// As [`MmapVec::try_reserve`]; the element comes back.
    #[inline]
    pub(crate) fn try_push(&mut self, element: T) -> Result<(), (T, Errno)> {
        if let Err(errno) = self.try_reserve(1) {
            return Err((element, errno));
        }
        // SAFETY: `len < capacity` was reserved; `write` fills the place without dropping what it held.
        unsafe { self.first.as_ptr().add(self.len).write(element) };
        self.len += 1;
        Ok(())
    }

    /// Puts `element` before the one at `index`.
    ///
    /// # Errors
    ///
    /// As [`MmapVec::try_reserve`]; the element comes back.
    pub(crate) fn try_insert(&mut self, index: usize, element: T) -> Result<(), (T, Errno)> {
        assert!(index <= self.len, "insertion at {index} into {} elements", self.len);
        if let Err(errno) = self.try_reserve(1) {
            return Err((element, errno));
        }
        // SAFETY: `index <= len` was asserted and `len < capacity` reserved, so the gap, the elements that move up by
        // one and the place they move to lie in the mapping; `write` fills the gap without dropping what it held.
        unsafe {
            let gap = self.first.as_ptr().add(index);
            ptr::copy(gap, gap.add(1), self.len - index);
            gap.write(element);
        }
        self.len += 1;
        Ok(())
    }

    /// Takes the last element out.
    pub(crate) fn pop(&mut self) -> Option<T> {
        self.len = self.len.checked_sub(1)?;
        // SAFETY: the element at the new `len` was alive, and the shorter `len` disowns it.
        Some(unsafe { self.first.as_ptr().add(self.len).read() })
    }

    /// Takes the element at `index` out; those after it move down.
    pub(crate) fn remove(&mut self, index: usize) -> T {
        assert!(index < self.len, "removal at {index} from {} elements", self.len);
        self.len -= 1;
        // SAFETY: `index` was asserted to be alive; it is read once, and then overwritten by those behind it, which all
        // lie below the old `len`. The new `len` disowns the last place, whose element has moved.
        unsafe {
            let hole = self.first.as_ptr().add(index);
            let element = hole.read();
            ptr::copy(hole.add(1), hole, self.len - index);
            element
        }
    }

    /// Takes the element at `index` out; the last one takes its place.
    pub(crate) fn swap_remove(&mut self, index: usize) -> T {
        let last = self.len.saturating_sub(1);
        self.swap(index, last);
        self.remove(last)
    }

    /// Drops all elements from the one at `len` on.
    pub(crate) fn truncate(&mut self, len: usize) {
        if len < self.len {
            let tail = ptr::slice_from_raw_parts_mut(self[len..].as_mut_ptr(), self.len - len);
            // Disowned first, so that a drop that panics can't make any of them be dropped twice.
            self.len = len;
            // SAFETY: `tail` spans elements that were alive and that `len` no longer counts.
            unsafe { tail.drop_in_place() }
        }
    }

    /// Drops all elements; the mapping stays.
    pub(crate) fn clear(&mut self) {
        self.truncate(0);
    }

    /// Takes out the elements that `leaves` picks and hands them to `each`, in order; the others keep their order.
    ///
    /// If a closure panics, the elements that were not yet looked at are leaked.
    pub(crate) fn drain_where(&mut self, mut leaves: impl FnMut(&mut T) -> bool, mut each: impl FnMut(T)) {
        let first = self.first.as_ptr();
        // Elements are disowned here, and owned again one by one as they prove to stay.
        let looked_at = 0..std::mem::take(&mut self.len);
        for index in looked_at {
            // SAFETY: `index` is below the old `len`, so its element is alive; only places below it were written to.
            let element = unsafe { &mut *first.add(index) };
            if leaves(element) {
                // SAFETY: it is read once and not counted by `len`.
                each(unsafe { first.add(index).read() });
            } else {
                // SAFETY: `len <= index`, so both places are in the mapping, and the element at `len`, if it isn't this
                // one, was moved out by an earlier round.
                unsafe { ptr::copy(first.add(index), first.add(self.len), 1) };
                self.len += 1;
            }
        }
    }

    /// Moves to a mapping of whole pages that holds at least `needed` elements and at least twice as many as before.
    #[cold]
    fn grow(&mut self, needed: usize) -> Result<(), Errno> {
        #[cfg(test)]
        if tests::GROWTH_REFUSED.get() {
            return Err(Errno::ENOMEM);
        }
        let bytes = needed
            .max(self.capacity * 2)
            .checked_mul(size_of::<T>())
            .and_then(|bytes| bytes.checked_next_multiple_of(page_size()))
            .filter(|&bytes| isize::try_from(bytes).is_ok())
            .ok_or(Errno::ENOMEM)?;
        let mut map =
            MmapMut::map_anon(bytes).map_err(|error| error.raw_os_error().map_or(Errno::ENOMEM, Errno::from_raw))?;
        let first = NonNull::from(&mut *map).cast::<T>();
        // SAFETY: the new mapping is apart from the old one, larger, and aligned to a page, which `new` asserted to be
        // enough. The old mapping goes without a drop of what was in it.
        unsafe { ptr::copy_nonoverlapping(self.first.as_ptr(), first.as_ptr(), self.len) };
        self.first = first;
        self.capacity = bytes / size_of::<T>();
        self.map = Some(map);
        Ok(())
    }
}

impl<T> Deref for MmapVec<T> {
    type Target = [T];

    fn deref(&self) -> &[T] {
        // SAFETY: `len` elements from `first` are alive, and `first` is aligned and not null even while dangling.
        unsafe { std::slice::from_raw_parts(self.first.as_ptr(), self.len) }
    }
}

impl<T> DerefMut for MmapVec<T> {
    fn deref_mut(&mut self) -> &mut [T] {
        // SAFETY: as in `deref`; `&mut self` makes this the only way to the elements.
        unsafe { std::slice::from_raw_parts_mut(self.first.as_ptr(), self.len) }
    }
}

impl<T> Drop for MmapVec<T> {
    fn drop(&mut self) {
        self.clear();
    }
}

#[cfg(test)]
pub(super) mod tests {
    use std::cell::{Cell, RefCell};
    use std::panic::{AssertUnwindSafe, catch_unwind};
    use std::rc::Rc;

    use proptest::prelude::*;

    use super::*;

    thread_local! {
        /// Makes each growth on this thread fail as if memory were used up.
        pub(in crate::space) static GROWTH_REFUSED: Cell<bool> = const { Cell::new(false) };
    }

    fn filled(elements: impl IntoIterator<Item = usize>) -> MmapVec<Rc<usize>> {
        let mut vec = MmapVec::new();
        elements.into_iter().for_each(|element| vec.try_push(Rc::new(element)).unwrap());
        vec
    }

    #[test]
    fn nothing_is_mapped_before_the_first_element() {
        let mut vec = MmapVec::<u64>::new();
        assert!(vec.map.is_none() && vec.is_empty() && vec.pop().is_none());
        vec.try_reserve(0).unwrap();
        assert!(vec.map.is_none());
        vec.try_push(7).unwrap();
        assert_eq!(vec.capacity, page_size() / 8);
    }

    #[test]
    fn growth_doubles_whole_pages_and_keeps_the_elements() {
        let mut vec = MmapVec::<[u8; 56]>::new();
        let mut bytes = Vec::new();
        for element in 0..5000_usize {
            vec.try_push([element as u8; 56]).unwrap();
            let mapped = vec.map.as_ref().unwrap().len();
            if bytes.last() != Some(&mapped) {
                bytes.push(mapped);
            }
        }
        assert!((0..5000).all(|element| vec[element] == [element as u8; 56]));
        assert!(bytes.iter().all(|mapped| mapped % page_size() == 0));
        assert!(bytes.windows(2).all(|pair| pair[1] == pair[0] * 2), "{bytes:?}");
    }

    #[test]
    fn elements_as_aligned_as_a_page_and_larger_than_a_page_fit() {
        #[repr(align(4096))]
        struct Big([u8; 6000]);
        let mut vec = MmapVec::new();
        (0..9).for_each(|element| assert!(vec.try_push(Big([element; 6000])).is_ok()));
        assert!(vec.iter().enumerate().all(|(i, big)| big.0[5999] == i as u8));
        assert_eq!(vec.as_ptr() as usize % 4096, 0);
    }

    #[test]
    fn a_refused_growth_gives_the_element_back_and_changes_nothing() {
        let mut vec = filled(0..3);
        assert_eq!(vec.try_reserve(usize::MAX), Err(Errno::ENOMEM));
        assert_eq!(vec.try_reserve(isize::MAX as usize / 8), Err(Errno::ENOMEM));
        assert_eq!(vec.try_reserve(isize::MAX as usize / 16), Err(Errno::ENOMEM));
        let room = vec.capacity - vec.len;
        (0..room).for_each(|element| vec.try_push(Rc::new(element)).unwrap());
        GROWTH_REFUSED.set(true);
        let refused = vec.try_insert(1, Rc::new(99));
        GROWTH_REFUSED.set(false);
        assert_eq!(refused, Err((Rc::new(99), Errno::ENOMEM)));
        assert_eq!((*vec[1], vec.len()), (1, room + 3));
    }

    #[test]
    fn out_of_bounds_panics_and_changes_nothing() {
        let mut vec = filled(0..3);
        assert!(catch_unwind(AssertUnwindSafe(|| vec.remove(3))).is_err());
        assert!(catch_unwind(AssertUnwindSafe(|| vec.swap_remove(3))).is_err());
        assert!(catch_unwind(AssertUnwindSafe(|| vec.try_insert(4, Rc::new(0)))).is_err());
        assert!(catch_unwind(|| MmapVec::<u8>::new().swap_remove(0)).is_err());
        assert_eq!(vec.iter().map(|element| **element).collect::<Vec<_>>(), [0, 1, 2]);
    }

    #[test]
    fn a_closure_that_panics_in_a_drain_makes_nothing_drop_twice() {
        struct Logged<'a>(usize, &'a RefCell<Vec<usize>>);
        impl Drop for Logged<'_> {
            fn drop(&mut self) {
                self.1.borrow_mut().push(self.0);
            }
        }

        let log = RefCell::new(Vec::new());
        let mut vec = MmapVec::new();
        (0..6).for_each(|element| assert!(vec.try_push(Logged(element, &log)).is_ok()));
        let drained = catch_unwind(AssertUnwindSafe(|| {
            vec.drain_where(|element| element.0 % 2 == 1, |element| assert_ne!(element.0, 3));
        }));
        assert!(drained.is_err());
        assert_eq!(vec.iter().map(|element| element.0).collect::<Vec<_>>(), [0, 2]);
        drop(vec);
        assert_eq!(log.take(), [1, 3, 0, 2]);
    }

    #[derive(Clone, Debug)]
    enum Op {
        Push,
        Insert(usize),
        Pop,
        Remove(usize),
        SwapRemove(usize),
        Truncate(usize),
        Clear,
        DrainMultiples(usize),
        Reserve(usize),
    }

    fn op() -> impl Strategy<Value = Op> {
        let at = || 0..2000_usize;
        prop_oneof![
            30 => Just(Op::Push),
            30 => at().prop_map(Op::Insert),
            5 => Just(Op::Pop),
            5 => at().prop_map(Op::Remove),
            5 => at().prop_map(Op::SwapRemove),
            1 => at().prop_map(Op::Truncate),
            1 => Just(Op::Clear),
            1 => (2..9_usize).prop_map(Op::DrainMultiples),
            1 => at().prop_map(Op::Reserve),
        ]
    }

    proptest! {
        #![proptest_config(ProptestConfig {
            cases: if cfg!(miri) { 4 } else { 128 },
            failure_persistence: None,
            ..ProptestConfig::default()
        })]

        /// Any sequence of changes leaves what a `Vec` would hold, and drops each element exactly once.
        #[test]
        fn it_holds_what_a_vec_would(ops in prop::collection::vec(op(), 1..if cfg!(miri) { 60 } else { 1500 })) {
            let (mut vec, mut model) = (MmapVec::new(), Vec::new());
            for (serial, op) in ops.into_iter().enumerate() {
                let element = Rc::new(serial);
                match op {
                    Op::Push => { vec.try_push(element.clone()).unwrap(); model.push(element); }
                    Op::Insert(at) => {
                        let at = at % (model.len() + 1);
                        vec.try_insert(at, element.clone()).unwrap();
                        model.insert(at, element);
                    }
                    Op::Pop => prop_assert_eq!(vec.pop(), model.pop()),
                    Op::Remove(at) if at < model.len() => prop_assert_eq!(vec.remove(at), model.remove(at)),
                    Op::SwapRemove(at) if at < model.len() => {
                        prop_assert_eq!(vec.swap_remove(at), model.swap_remove(at));
                    }
                    Op::Truncate(len) => { vec.truncate(len); model.truncate(len); }
                    Op::Clear => { vec.clear(); model.clear(); }
                    Op::DrainMultiples(of) => {
                        let mut drained = Vec::new();
                        vec.drain_where(|element| **element % of == 0, |element| drained.push(element));
                        let (leave, stay) = model.into_iter().partition(|element| **element % of == 0);
                        model = stay;
                        prop_assert_eq!(drained, leave);
                    }
                    Op::Reserve(additional) => {
                        vec.try_reserve(additional).unwrap();
                        prop_assert!(vec.capacity >= vec.len() + additional);
                    }
                    Op::Remove(_) | Op::SwapRemove(_) => {}
                }
                prop_assert_eq!(&vec[..], &model[..]);
            }
            prop_assert!(model.iter().all(|element| Rc::strong_count(element) == 2));
            drop(vec);
            prop_assert!(model.iter().all(|element| Rc::strong_count(element) == 1));
        }
    }
}
