//! Serving VMs with the pages of one stream of one epoch.

use std::collections::BTreeMap;
use std::ops::Range;
use std::path::Path;
use std::sync::{Arc, Condvar, Mutex, PoisonError, Weak};
use std::thread::JoinHandle;
use std::time::Duration;

use super::faults::FaultThread;
use super::image::Image;
use super::listen::Listening;
use super::populate::{Outcome, Populator};
use super::vm::{Admission, End, Vm, VmStatus, kill};
use crate::error::{Error, Kind, Result};
use crate::platform::lock::lock;
use crate::restore::{Extent, Prefetcher};

/// What becomes of a VM whose memory cannot be served.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum OnDamage {
    /// Its process is killed, at once and with a line in the log.
    #[default]
    Kill,
    /// It stands still at the page it waits for, until that can be read.
    Hold,
}

/// How VMs are served.
#[derive(Clone)]
pub struct Options {
    pub on_damage: OnDamage,
    /// How long a page is tried that the store fails to give. Damage is not waited for.
    pub patience: Duration,
    /// Fill all memory ahead of its use, from the moment a VM is served, and then let it go.
    pub populate: bool,
    pub populate_threads: usize,
    /// Fills ahead what a restore is expected to need, and records what it touches for the next one.
    pub prefetcher: Option<Arc<Prefetcher>>,
    /// Hears of each page that is touched before it is there: the VM and the page of the stream, in order.
    pub touched: Option<Arc<dyn Fn(u64, u64) + Send + Sync>>,
    /// Hears how a VM's time here ended.
    pub ended: Option<Arc<dyn Fn(u64, End) + Send + Sync>>,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            on_damage: OnDamage::Kill,
            patience: Duration::from_secs(30),
            populate: false,
            populate_threads: 2,
            prefetcher: None,
            touched: None,
            ended: None,
        }
    }
}

/// Serves until it is dropped; VMs that are left then are left alone.
pub struct Server {
    inner: Arc<Inner>,
    listening: Option<Listening>,
}

pub(super) struct Inner {
    image: Arc<Image>,
    options: Options,
    populator: Mutex<Populator>,
    vms: Mutex<BTreeMap<u64, Served>>,
    fewer: Condvar,
}

struct Served {
    vm: Arc<Vm>,
    thread: Option<JoinHandle<()>>,
    is_populated: bool,
}

impl Server {
    pub fn new(image: Image, options: Options) -> Result<Self> {
        let populator = Mutex::new(Populator::new(options.populate_threads)?);
        let inner = Inner { image: Arc::new(image), options, populator, vms: Mutex::default(), fewer: Condvar::new() };
        Ok(Self { inner: Arc::new(inner), listening: None })
    }

    /// Makes a socket for Firecracker to connect to, and serves who does.
    pub fn listen(&mut self, path: &Path) -> Result<()> {
        self.listening = Some(Listening::start(path, self.inner.clone())?);
        Ok(())
    }

    /// Serves one VM, under a number that no other has.
    pub fn serve(&self, id: u64, admission: Admission) -> Result<Arc<Vm>> {
        Inner::serve(&self.inner, id, admission)
    }

    pub fn image(&self) -> &Arc<Image> {
        &self.inner.image
    }

    /// The VMs that are served now.
    pub fn vms(&self) -> Vec<VmStatus> {
        lock(&self.inner.vms).values().map(|served| served.vm.status()).collect()
    }

    pub fn vm(&self, id: u64) -> Option<Arc<Vm>> {
        lock(&self.inner.vms).get(&id).map(|served| served.vm.clone())
    }

    /// Fills these pages of a VM ahead of their use, in this order; `told` hears what came of it.
    pub fn populate(
        &self,
        id: u64,
        pages: &[Range<u64>],
        told: impl Fn(Outcome) + Send + Sync + 'static,
    ) -> Result<()> {
        let vm = self.vm(id).ok_or_else(|| Error::new(Kind::NotFound, format!("there is no VM {id}")))?;
        lock(&self.inner.populator).pages(vm, pages, told);
        Ok(())
    }

    /// Fills all memory of all VMs and lets them go, so that they need no server any more.
    pub fn finish(&self) {
        let ids: Vec<u64> = lock(&self.inner.vms).keys().copied().collect();
        ids.into_iter().for_each(|id| self.inner.populate_all(id));
    }

    /// Waits until no VM is left, but not for longer than this; returns whether none is.
    pub fn wait(&self, longest: Duration) -> bool {
        let vms = lock(&self.inner.vms);
        let waited = self.inner.fewer.wait_timeout_while(vms, longest, |vms| !vms.is_empty());
        waited.unwrap_or_else(PoisonError::into_inner).0.is_empty()
    }

    /// Kills all VMs.
    pub fn kill_all(&self, why: &str) {
        for served in lock(&self.inner.vms).values() {
            served.vm.kill(why);
        }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.listening = None;
        let mut threads = Vec::new();
        for served in lock(&self.inner.vms).values_mut() {
            served.vm.stop();
            threads.extend(served.thread.take());
        }
        lock(&self.inner.populator).close();
        for thread in threads {
            let _ = thread.join();
        }
    }
}

impl Inner {
    pub fn image(&self) -> &Image {
        &self.image
    }

    pub fn options(&self) -> &Options {
        &self.options
    }

    /// Serves a VM. One that cannot be served must not wait for ever.
    pub fn serve(inner: &Arc<Self>, id: u64, admission: Admission) -> Result<Arc<Vm>> {
        let peer = admission.peer.try_clone()?;
        Self::begin(inner, id, admission).inspect_err(|error| {
            kill(&peer, &inner.image.name(), &format!("it cannot be served: {error}"));
        })
    }

    fn begin(inner: &Arc<Self>, id: u64, admission: Admission) -> Result<Arc<Vm>> {
        let (vm, inbox) = Vm::new(id, inner.image.clone(), admission)?;
        let vm = Arc::new(vm);
        tracing::info!("serving {} with {}, {} MiB", vm.peer(), inner.image.name(), vm.layout().len() >> 20);
        let mut vms = lock(&inner.vms);
        let thread = FaultThread::new(vm.clone(), inbox, inner.options.clone());
        let weak = Arc::downgrade(inner);
        let thread = std::thread::Builder::new()
            .name(format!("vm {id}"))
            .spawn(move || ended(&weak, id, thread.run()))
            .map_err(|error| Error::io("cannot start a thread", error))?;
        vms.insert(id, Served { vm: vm.clone(), thread: Some(thread), is_populated: false });
        drop(vms);
        if let Some(prefetcher) = &inner.options.prefetcher
            && let Some(target) = inner.image.target(vm.residency().clone(), vm.clone())
        {
            prefetcher.begin(target, Extent::Forecast);
        }
        if inner.options.populate {
            inner.populate_all(id);
        }
        Ok(vm)
    }

    fn populate_all(&self, id: u64) {
        let vm = {
            let mut vms = lock(&self.vms);
            let Some(served) = vms.get_mut(&id).filter(|served| !served.is_populated) else { return };
            served.is_populated = true;
            served.vm.clone()
        };
        let (peer, name) = (vm.peer().pid(), self.image.name());
        lock(&self.populator).all(vm, move |outcome| match outcome.failed {
            0 => tracing::info!("process {peer} has all of {name}: {} pages were filled ahead", outcome.filled),
            failed => {
                tracing::warn!("process {peer} goes on needing this server: {failed} pages of {name} are missing")
            }
        });
    }
}

/// In the thread of a VM whose time is over.
fn ended(inner: &Weak<Inner>, id: u64, end: End) {
    let Some(inner) = inner.upgrade() else { return };
    let Some(vm) = lock(&inner.vms).remove(&id).map(|served| served.vm) else { return };
    vm.residency().close();
    let status = vm.status();
    let faults = format!("{} faults, {} pages filled ahead", status.faults, status.pushed_pages);
    match end {
        End::Exited => tracing::info!("{} ended: {faults}", vm.peer()),
        End::Released => tracing::info!("{} has all its memory, and was let go: {faults}", vm.peer()),
        End::Killed => {}
        End::Stopped => tracing::info!("{} is left alone: {faults}", vm.peer()),
    }
    drop(vm);
    if let Some(told) = &inner.options.ended {
        told(id, end);
    }
    inner.fewer.notify_all();
}
