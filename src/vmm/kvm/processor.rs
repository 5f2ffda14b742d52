//! A processor: the thread that runs it, and how it is stopped.

use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;

use kvm_ioctls::{VcpuExit, VcpuFd, VmFd};
use rustix::io::Errno;

use super::guest::{REPORT_PORT, Report, SERIAL_PORT};
use super::kick::{self, ImmediateExit};
use super::serial::Serial;
use super::state::{Readable, save_processor};
use super::vmstate::VmState;
use crate::capture::{DirtyRing, EXIT_RING_FULL};
use crate::error::{Error, Kind, Result};
use crate::platform::lock::lock;

/// What a processor is to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Order {
    Run,
    /// Stop, and save the state.
    Pause,
    End,
}

struct Status {
    order: Order,
    is_stopped: bool,
    saved: Option<Result<VmState>>,
}

/// What processors share.
pub struct Board {
    pub vm: Arc<VmFd>,
    pub serial: Mutex<Serial>,
    pub ring: Option<DirtyRing>,
    pub readable: Readable,
    /// What the guest writes to its serial port.
    pub output: Mutex<Box<dyn FnMut(u8) + Send>>,
    events: Mutex<Vec<Event>>,
    told: Condvar,
}

/// What a processor has to say.
#[derive(Debug)]
pub enum Event {
    Report(u16, Report),
    /// It cannot go on.
    Failed(u16, Error),
}

impl Board {
    pub fn new(vm: Arc<VmFd>, ring: Option<DirtyRing>, readable: Readable, output: Box<dyn FnMut(u8) + Send>) -> Self {
        let (events, told) = Default::default();
        Self { vm, serial: Mutex::default(), ring, readable, output: Mutex::new(output), events, told }
    }

    fn tell(&self, event: Event) {
        lock(&self.events).push(event);
        self.told.notify_all();
    }

    /// Waits for an event, but not longer.
    pub fn wait(&self, time: std::time::Duration) -> Option<Event> {
        let events = lock(&self.events);
        let waited = self.told.wait_timeout_while(events, time, |events| events.is_empty());
        let (mut events, _) = waited.unwrap_or_else(PoisonError::into_inner);
        (!events.is_empty()).then(|| events.remove(0))
    }

    fn serial(&self) -> MutexGuard<'_, Serial> {
        lock(&self.serial)
    }
}

struct Shared {
    status: Mutex<Status>,
    changed: Condvar,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Status> {
        lock(&self.status)
    }
}

/// A processor with its thread; stopped at first.
pub struct Processor {
    shared: Arc<Shared>,
    immediate_exit: ImmediateExit,
    thread: Option<JoinHandle<()>>,
}

impl Processor {
    pub fn start(number: u16, mut processor: VcpuFd, board: Arc<Board>) -> Result<Self> {
        let status = Status { order: Order::Pause, is_stopped: true, saved: None };
        let shared = Arc::new(Shared { status: Mutex::new(status), changed: Condvar::new() });
        let immediate_exit = ImmediateExit::of(&mut processor);
        let own = shared.clone();
        let thread = std::thread::Builder::new()
            .name(format!("processor {number}"))
            .spawn(move || {
                Thread { number, processor, board, shared: own, immediate_exit }.run();
            })
            .map_err(|error| Error::io("cannot start a thread", error))?;
        Ok(Self { shared, immediate_exit, thread: Some(thread) })
    }

    /// Asks it to stop. Ask all of them before waiting for one.
    pub fn pause(&self) -> Result<()> {
        {
            let mut status = self.shared.lock();
            status.order = Order::Pause;
            self.immediate_exit.set(true);
        }
        self.thread.as_ref().map_or(Ok(()), kick::kick)
    }

    /// Waits until it has stopped.
    pub fn wait_stopped(&self) {
        let status = self.shared.lock();
        drop(
            self.shared.changed.wait_while(status, |status| !status.is_stopped).unwrap_or_else(PoisonError::into_inner),
        );
    }

    /// Its state, which it saves when it stops.
    pub fn state(&self) -> Result<VmState> {
        let status = self.shared.lock();
        let waited = self.shared.changed.wait_while(status, |status| status.saved.is_none());
        let status = waited.unwrap_or_else(PoisonError::into_inner);
        match status.saved.as_ref().expect("it was waited for") {
            Ok(state) => Ok(state.clone()),
            Err(error) => Err(Error::new(error.kind(), error.to_string())),
        }
    }

    pub fn resume(&self) {
        // It has stopped, and its state is what it is, until it really runs again.
        self.shared.lock().order = Order::Run;
        self.shared.changed.notify_all();
    }
}

impl Drop for Processor {
    fn drop(&mut self) {
        {
            // With the lock held: once the thread has seen the order, its processor is gone.
            let mut status = self.shared.lock();
            status.order = Order::End;
            self.immediate_exit.set(true);
            self.shared.changed.notify_all();
        }
        if let Some(thread) = self.thread.take() {
            // It may be told just before it looks.
            let _ = kick::kick(&thread);
            let _ = thread.join();
        }
    }
}

/// What the thread has.
struct Thread {
    number: u16,
    processor: VcpuFd,
    board: Arc<Board>,
    shared: Arc<Shared>,
    immediate_exit: ImmediateExit,
}

impl Thread {
    fn run(&mut self) {
        // It can be saved before it ever ran.
        self.stop();
        while self.wait_for_order() {
            if let Err(error) = self.run_guest() {
                self.board.tell(Event::Failed(self.number, error));
                // It can never run again. Who wants to pause it finds it stopped.
                self.shared.lock().order = Order::Pause;
            }
            self.stop();
        }
    }

    /// False at the end.
    fn wait_for_order(&self) -> bool {
        let status = self.shared.lock();
        let waited = self.shared.changed.wait_while(status, |status| status.order == Order::Pause);
        let mut status = waited.unwrap_or_else(PoisonError::into_inner);
        if status.order == Order::End {
            return false;
        }
        // Whoever gives an order sets it afterwards, so that this never undoes one.
        self.immediate_exit.set(false);
        status.is_stopped = false;
        status.saved = None;
        true
    }

    /// Tells that it has stopped, and saves its state.
    fn stop(&self) {
        {
            let mut status = self.shared.lock();
            if status.order == Order::End {
                return;
            }
            status.is_stopped = true;
            self.shared.changed.notify_all();
        }
        let saved = save_processor(&self.processor, &self.board.vm, self.number, &self.board.readable);
        let mut status = self.shared.lock();
        status.saved = Some(saved);
        self.shared.changed.notify_all();
    }

    /// Runs the guest until this thread is told to stop. Only then, and never between an access to a port and its
    /// completion, which KVM makes when the guest is entered again.
    fn run_guest(&mut self) -> Result<()> {
        loop {
            match self.processor.run() {
                Ok(VcpuExit::IoOut(port, data)) => self.board.write_port(self.number, port, data),
                Ok(VcpuExit::IoIn(port, data)) => self.board.read_port(port, data),
                // Nothing is there: reads are ones, and writes go nowhere.
                Ok(VcpuExit::MmioRead(_, data)) => data.fill(0xff),
                Ok(VcpuExit::MmioWrite(..)) => {}
                Ok(VcpuExit::Unsupported(EXIT_RING_FULL)) => {
                    if let Some(ring) = &self.board.ring {
                        ring.relieve()?;
                    }
                }
                Ok(VcpuExit::Intr) => {}
                Ok(exit) => {
                    let exit = format!("{exit:?}");
                    let at = self.processor.get_regs().map_or(0, |registers| registers.rip);
                    return Err(Error::new(Kind::Io, format!("processor {} stopped at {at:#x}: {exit}", self.number))
                        .hint("the guest did something that this host's KVM cannot do, or ended badly"));
                }
                Err(error)
                    if [Errno::INTR, Errno::AGAIN].map(|errno| errno.raw_os_error()).contains(&error.errno()) =>
                {
                    if self.shared.lock().order != Order::Run {
                        return Ok(());
                    }
                }
                Err(error) => return Err(super::kvm_error("KVM cannot run the guest")(error)),
            }
        }
    }
}

impl Board {
    fn write_port(&self, processor: u16, port: u16, data: &[u8]) {
        if (SERIAL_PORT..SERIAL_PORT + 8).contains(&port) {
            for value in data {
                if let Some(byte) = self.serial().write(usize::from(port - SERIAL_PORT), *value) {
                    (lock(&self.output))(byte);
                }
            }
        } else if port == REPORT_PORT {
            let mut number = [0; 4];
            let len = data.len().min(4);
            number[..len].copy_from_slice(&data[..len]);
            self.tell(Event::Report(processor, Report::of(u32::from_le_bytes(number))));
        }
    }

    fn read_port(&self, port: u16, data: &mut [u8]) {
        match (SERIAL_PORT..SERIAL_PORT + 8).contains(&port) {
            true => data.fill(self.serial().read(usize::from(port - SERIAL_PORT))),
            false => data.fill(0xff),
        }
    }
}
