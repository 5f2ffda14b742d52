//! Streams a large object past the page cache, on a thread of its own, while the caller prepares the next bytes.
//!
//! Direct writes are at least as quick as buffered ones at a fraction of their processor time, and they leave the
//! page cache to the virtual machines.

use std::io;
use std::sync::Arc;
use std::thread::{Builder, JoinHandle};

use crossbeam_channel::{Receiver, Sender, bounded};

use super::buffer::AlignedBuffer;
use super::publish::{Shared, Temporary};
use crate::error::{Error, Kind, Result};
use crate::platform::files::DIRECT_ALIGNMENT;
use crate::platform::store::{ObjectWriter, Put};

/// How much is written at once. An object no larger than this needs no thread.
pub(super) const BUFFER_LEN: usize = 1 << 20;

/// How many buffers go round between the caller and the thread.
const BUFFERS: usize = 4;

pub(super) struct LocalWriter {
    shared: Arc<Shared>,
    key: String,
    len: u64,
    current: AlignedBuffer,
    /// Starts when the first buffer is full and more bytes come.
    stream: Option<Stream>,
    failed: bool,
}

/// The caller's end of the thread.
struct Stream {
    full: Sender<AlignedBuffer>,
    free: Receiver<AlignedBuffer>,
    /// How many buffers there are, the caller's current one included.
    buffers: usize,
    thread: JoinHandle<io::Result<Temporary>>,
}

impl LocalWriter {
    pub fn new(shared: Arc<Shared>, key: &str) -> Self {
        let current = AlignedBuffer::new(BUFFER_LEN);
        Self { shared, key: key.to_owned(), len: 0, current, stream: None, failed: false }
    }

    /// Gives the full buffer to the thread and takes an empty one.
    fn hand_over(&mut self) -> Result<()> {
        if self.stream.is_none() {
            let started = Stream::start(&self.shared).map_err(|error| self.error(error))?;
            self.stream = Some(started);
        }
        if let Some(stream) = &mut self.stream
            && let Some(empty) = stream.empty_buffer()
        {
            let full = std::mem::replace(&mut self.current, empty);
            if stream.full.send(full).is_ok() {
                return Ok(());
            }
        }
        // The thread is gone, and its result says why.
        Err(match self.stop() {
            Some(Err(error)) => self.error(error),
            _ => self.stopped(),
        })
    }

    /// Ends the thread, which first writes what it was given.
    fn stop(&mut self) -> Option<io::Result<Temporary>> {
        self.stream.take().map(Stream::stop)
    }

    fn error(&self, error: io::Error) -> Error {
        self.shared.write_error(&self.key, error)
    }

    fn stopped(&self) -> Error {
        let message = format!("cannot write {} in {}: an earlier part failed", self.key, self.shared.url());
        Error::new(Kind::Io, message)
    }
}

impl ObjectWriter for LocalWriter {
    fn append(&mut self, mut bytes: &[u8]) -> Result<()> {
        if self.failed {
            return Err(self.stopped());
        }
        self.len += bytes.len() as u64;
        while !bytes.is_empty() {
            if self.current.is_full() {
                self.hand_over().inspect_err(|_| self.failed = true)?;
            }
            let taken = self.current.fill(bytes);
            bytes = &bytes[taken..];
        }
        Ok(())
    }

    fn finish(mut self: Box<Self>) -> Result<()> {
        if self.failed {
            return Err(self.stopped());
        }
        let put = match self.stream.take() {
            None => self.shared.put(&self.key, &[self.current.filled()])?,
            Some(stream) => {
                // A send fails only when the thread has failed, and then its result says so.
                let _ = stream.full.send(std::mem::replace(&mut self.current, AlignedBuffer::new(0)));
                let temporary = stream.stop().map_err(|error| self.error(error))?;
                self.shared.publish(temporary, &self.key, self.len)?
            }
        };
        match put {
            Put::Created => Ok(()),
            Put::Exists => {
                let message = format!("cannot write {} in {}: the key is taken", self.key, self.shared.url());
                Err(Error::conflict(message))
            }
        }
    }
}

impl Drop for LocalWriter {
    fn drop(&mut self) {
        // The temporary file goes away with the thread's result.
        drop(self.stop());
    }
}

impl Stream {
    fn start(shared: &Arc<Shared>) -> io::Result<Self> {
        let (full, full_receiver) = bounded(BUFFERS);
        let (free_sender, free) = bounded(BUFFERS);
        let shared = Arc::clone(shared);
        let thread = Builder::new()
            .name("object-writer".to_owned())
            .spawn(move || write_all(&shared, &full_receiver, &free_sender))?;
        Ok(Self { full, free, buffers: 1, thread })
    }

    /// A buffer to fill, or none when the thread is gone.
    fn empty_buffer(&mut self) -> Option<AlignedBuffer> {
        if let Ok(buffer) = self.free.try_recv() {
            return Some(buffer);
        }
        if self.buffers < BUFFERS {
            self.buffers += 1;
            return Some(AlignedBuffer::new(BUFFER_LEN));
        }
        self.free.recv().ok()
    }

    fn stop(self) -> io::Result<Temporary> {
        drop(self.full);
        self.thread.join().unwrap_or_else(|_| Err(io::Error::other("the writing thread panicked")))
    }
}

/// Writes buffers to a new temporary file until there are no more.
fn write_all(shared: &Shared, full: &Receiver<AlignedBuffer>, free: &Sender<AlignedBuffer>) -> io::Result<Temporary> {
    let (mut temporary, mut direct) = match shared.temporary(true) {
        Err(error) if error.kind() == io::ErrorKind::InvalidInput => (shared.temporary(false)?, false),
        result => (result?, true),
    };
    let mut offset = 0;
    for mut buffer in full {
        let len = buffer.filled().len() as u64;
        let written = temporary.write_at(offset, if direct { buffer.padded() } else { buffer.filled() });
        match written {
            // Some file systems open a direct file and refuse only to write to it, or want a larger alignment.
            Err(error) if direct && offset == 0 && error.kind() == io::ErrorKind::InvalidInput => {
                (temporary, direct) = (shared.temporary(false)?, false);
                temporary.write_at(0, buffer.filled())?;
            }
            result => result?,
        }
        offset += len;
        buffer.clear();
        let _ = free.send(buffer);
    }
    if direct && !offset.is_multiple_of(DIRECT_ALIGNMENT as u64) {
        temporary.set_len(offset)?;
    }
    Ok(temporary)
}
