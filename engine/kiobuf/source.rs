//! Pages that a program makes: decompressed, decrypted, computed, or fetched from another machine.

/// Makes the bytes of a page list on demand, when they are first touched.
pub trait PageSource: Send + Sync + 'static {
    /// Fills all of `buf` with the source's bytes from `offset_bytes` on.
    ///
    /// The offset is a multiple of the page size, and so is the length of `buf` except at the end of the source. Called
    /// on a worker thread of the engine, from several at a time; it may block, but must not touch memory of the same
    /// engine that is still missing.
    ///
    /// # Errors
    ///
    /// Any error, and a panic likewise, makes the touch that waits for these pages a SIGBUS.
    fn read_at(&self, offset_bytes: u64, buf: &mut [u8]) -> std::io::Result<()>;
}
