//! The threads that answer what the guest waits for: writes to protected pages, and pages that are not there yet.

use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::Duration;

use epochfs_format::{PAGE_SIZE, Page};
use rustix::event::{EventfdFlags, PollFd, PollFlags};

use super::frozen::Frozen;
use crate::error::{Error, Kind, Result};
use crate::platform::lock::lock;
use crate::uffd::Message;

/// Where pages come from that the guest touches before they are there. Asked by several threads at once.
pub trait Backing: Send + Sync {
    /// Reads one page of the stream, proven.
    fn read(&self, page: u64, content: &mut Page) -> Result<()>;
}

/// What the threads and the capture share.
struct Shared {
    frozen: Arc<Frozen>,
    backing: Option<Arc<dyn Backing>>,
    bell: OwnedFd,
    is_stopping: AtomicBool,
    /// Why the guest can never go on.
    failure: Mutex<Option<Error>>,
}

/// A page that cannot be read now is tried again for so long; a damaged one never.
const PATIENCE: u32 = 300;
const RETRY_WAIT: Duration = Duration::from_millis(100);

const MESSAGE_LEN: usize = 32;

pub(super) struct Faults {
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
}

impl Faults {
    pub fn start(frozen: Arc<Frozen>, backing: Option<Arc<dyn Backing>>, threads: usize) -> Result<Self> {
        let bell = rustix::event::eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)
            .map_err(|error| Error::io("cannot make an eventfd", error.into()))?;
        let shared = Shared { frozen, backing, bell, is_stopping: AtomicBool::new(false), failure: Mutex::default() };
        let shared = Arc::new(shared);
        let start = |_| {
            let shared = shared.clone();
            std::thread::Builder::new()
                .name("capture faults".into())
                .spawn(move || serve(&shared))
                .map_err(|error| Error::io("cannot start a thread", error))
        };
        let threads = (0..threads.max(1)).map(start).collect::<Result<_>>()?;
        Ok(Self { shared, threads })
    }

    /// Tells why the guest can never go on, once it cannot.
    pub fn failure(&self) -> impl Fn() -> Option<Error> + Send + 'static {
        let shared = self.shared.clone();
        move || lock(&shared.failure).as_ref().map(|error| Error::new(error.kind(), error.to_string()))
    }
}

impl Drop for Faults {
    fn drop(&mut self) {
        self.shared.is_stopping.store(true, Ordering::SeqCst);
        let _ = rustix::io::write(&self.shared.bell, &1_u64.to_ne_bytes());
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
    }
}

fn serve(shared: &Shared) {
    let mut buffer = [0; MESSAGE_LEN * 16];
    while !shared.is_stopping.load(Ordering::SeqCst) {
        let (uffd, bell) = (shared.frozen.uffd.as_fd(), shared.bell.as_fd());
        let mut polled = [PollFd::new(&uffd, PollFlags::IN), PollFd::new(&bell, PollFlags::IN)];
        let _ = rustix::event::poll(&mut polled, None);
        let len = match shared.frozen.uffd.read_messages(&mut buffer) {
            Ok(len) => len,
            Err(error) => {
                shared.fail(Error::io("cannot read what the guest waits for", error.into()));
                return;
            }
        };
        for message in buffer[..len].as_chunks::<MESSAGE_LEN>().0.iter().filter_map(Message::decode) {
            if let Err(error) = shared.answer(message) {
                shared.fail(error);
            }
        }
    }
}

impl Shared {
    fn answer(&self, message: Message) -> Result<()> {
        match message {
            Message::Protected(address) => {
                if let Some(page) = self.frozen.memory.page_at(address) {
                    // If there is no room, whoever reads the page wakes the guest.
                    self.frozen.conflict(page);
                }
                Ok(())
            }
            Message::Fault(address) => match (self.frozen.memory.page_at(address), &self.backing) {
                (Some(page), Some(backing)) => self.fill(page, &**backing),
                _ => Err(Error::new(Kind::Io, format!("the guest waits for {address:#x}, where it has no memory"))),
            },
            // A process may give up memory of a guest, which is zeros then.
            Message::Removed(_) | Message::Unmapped(_) => Ok(()),
            Message::Foreign(what) => {
                Err(Error::new(Kind::Io, format!("the guest waits for what cannot be served: {what}")))
            }
        }
    }

    fn fill(&self, page: u64, backing: &dyn Backing) -> Result<()> {
        let mut content = [0; PAGE_SIZE];
        let mut tries = 0;
        loop {
            match backing.read(page, &mut content) {
                Ok(()) => return self.frozen.fill(page, &content),
                Err(error) if error.kind() == Kind::Damaged || tries == PATIENCE => return Err(error),
                Err(error) => {
                    if tries == 0 {
                        tracing::warn!(%error, "page {page} of the guest cannot be read, and is tried again");
                    }
                    tries += 1;
                    std::thread::sleep(RETRY_WAIT);
                    if self.is_stopping.load(Ordering::SeqCst) {
                        return Ok(());
                    }
                }
            }
        }
    }

    fn fail(&self, error: Error) {
        {
            let mut failure = lock(&self.failure);
            if failure.is_none() {
                tracing::error!(%error, "the guest cannot go on");
                *failure = Some(error);
                return;
            }
        }
        // A processor that is told to stop may ask again and again.
        std::thread::sleep(RETRY_WAIT);
    }
}
