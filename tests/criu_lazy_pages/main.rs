//! The program that takes the place of CRIU's lazy-pages daemon, against a restore that says what CRIU says: its tasks are
//! processes, and their memory is what the images hold, whatever they do with it.

#[path = "../support/mod.rs"]
mod support;

#[allow(dead_code, reason = "the program uses all of it")]
#[path = "../../examples/criu_lazy_pages/images.rs"]
mod images;
#[path = "../../examples/criu_lazy_pages/list.rs"]
mod list;

/// Skips a test where a page can't be made a SIGBUS in another process.
macro_rules! needs_poison {
    () => {
        if !kiomap::probe().is_ok_and(|probe| probe.features.contains(kiomap::Features::POISON)) {
            $crate::skip!("without POISON nothing can be made a SIGBUS in another process");
        }
    };
}

mod broken;
mod events;
mod fake;
mod folder;
mod said;
mod served;
