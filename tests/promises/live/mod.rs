//! P6, and P1 for what was synced: a machine's live beside a naive oracle, through restarts, power cuts, failed commits
//! and the loss of ownership.

mod failures;
mod gone;
mod model;
mod power;

use std::path::{Path, PathBuf};
use std::sync::Arc;

use epochfs::Owner;
use epochfs::epoch::EpochStore;
use epochfs::epoch::live::{Budget, Creator, Live, LiveCommit, LiveSettings, ROOT, Refusal};
use epochfs::platform::files::Files;
use epochfs::platform::store::{LocalStore, Store};
use epochfs::repo::Repository;

use crate::support::{Check, Saying};

pub const MACHINE: &str = "web1";
pub const PAGE: usize = 4096;
const REPOSITORY: &str = "/repository";

pub fn host(number: u8) -> Owner {
    Owner { host: [number; 16], name: format!("host{number}"), lease_ms: 0 }
}

pub fn creator() -> Creator {
    Creator { mode: 0o644, owner: 0, group: 0 }
}

/// Makes the repository with one machine.
pub fn create_machine(files: Arc<dyn Files>) -> Check {
    let store = LocalStore::create(Path::new(REPOSITORY), files).saying("create the store")?;
    let store = EpochStore::new(Repository::create(Arc::new(store)).saying("create the repository")?);
    store.create_machine(MACHINE).saying("create the machine")?;
    Ok(())
}

pub fn open_store(files: Arc<dyn Files>) -> Check<Arc<dyn Store>> {
    Ok(Arc::new(LocalStore::open(Path::new(REPOSITORY), files).saying("open the store")?))
}

/// A machine's live as one daemon sees it. Dropping it is what `kill -9` does.
pub struct Daemon {
    pub store: Arc<EpochStore>,
    pub live: Arc<Live>,
}

impl Daemon {
    pub fn start(store: Arc<dyn Store>, files: Arc<dyn Files>, number: u8) -> Check<Self> {
        Self::start_with(store, files, number, 1 << 30)
    }

    pub fn start_with(store: Arc<dyn Store>, files: Arc<dyn Files>, number: u8, spool_len_max: u64) -> Check<Self> {
        let repository = Repository::open(store).saying("open the repository")?;
        let store = Arc::new(EpochStore::new(repository));
        let settings = LiveSettings {
            files,
            directory: PathBuf::from(format!("/state{number}")),
            budget: Arc::new(Budget::new(spool_len_max, Box::new(|| None))),
            host: host(number),
            owner: 0,
            group: 0,
            pipeline_max: 3,
            compression_level: -1,
            read_only: false,
        };
        let live =
            Live::open(store.clone(), MACHINE.into(), Arc::new(settings), Box::new(|_| {})).saying("open the live")?;
        Ok(Self { store, live })
    }

    pub fn write(&self, name: &[u8], offset: u64, bytes: &[u8]) -> Result<(), Refusal> {
        let id = match self.live.lookup(ROOT, name) {
            Ok((id, _)) => id,
            Err(Refusal::NotFound) => self.live.create_file(ROOT, name, creator())?,
            Err(refusal) => return Err(refusal),
        };
        self.live.write(&self.live.file(id)?, offset, bytes)
    }

    pub fn read(&self, name: &[u8]) -> Check<Vec<u8>> {
        let (id, attributes) = self.live.lookup(ROOT, name).map_err(|refusal| format!("look up: {refusal:?}"))?;
        let file = self.live.file(id).map_err(|refusal| format!("open: {refusal:?}"))?;
        // Longer than the file: a read ends with it.
        let mut bytes = vec![0xee; attributes.length as usize + 100];
        let count = self.live.read(&file, 0, &mut bytes).saying("read")?;
        bytes.truncate(count);
        Ok(bytes)
    }

    pub fn commit(&self) -> epochfs::Result<u64> {
        Ok(self.live.commit(LiveCommit::default())?.wait()?.epoch)
    }
}

/// All files of an epoch by path.
pub fn epoch_files(store: &EpochStore, epoch: u64) -> Check<std::collections::BTreeMap<Vec<u8>, Vec<u8>>> {
    let epoch = store.epoch(&crate::support::numbered(MACHINE, epoch)).saying("open the epoch")?;
    let mut files = std::collections::BTreeMap::new();
    for (path, image) in epoch.manifest().streams() {
        let mut bytes = vec![0; image.length as usize];
        epoch.stream(path).saying("open")?.read_at(0, &mut bytes).saying("read")?;
        files.insert(path.to_vec(), bytes);
    }
    Ok(files)
}
