//! Frames of processes that are served over a socket, and of the engine that serves them.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    kiomap::fuzzing::wire(bytes);
});
