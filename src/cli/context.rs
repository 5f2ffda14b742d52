//! What a command works with: the repository it names, and how to print.

use std::ffi::OsString;
use std::path::PathBuf;
use std::sync::Arc;

use super::Global;
use super::output;
use super::progress::Progress;
use crate::epoch::{EpochStore, open_store};
use crate::error::{Error, Result};
use crate::fs::host_name;
use crate::ops::control::{Client, socket_path, sockets};
use crate::platform::keys::KeySettings;
use crate::platform::store::{Cache, CacheSettings, Location};
use crate::repo::{LeaseSettings, Repository, state_dir};

pub struct Context {
    global: Global,
    keys: KeySettings,
}

impl Context {
    pub fn new(global: Global) -> Self {
        // A variable that is empty is as good as none.
        let key_files = global.key_file.iter().filter(|file| !file.as_os_str().is_empty()).cloned().collect();
        let keys = KeySettings::of_process().with_files(key_files);
        Self { global, keys }
    }

    pub fn json(&self) -> bool {
        self.global.json
    }

    pub fn is_quiet(&self) -> bool {
        self.global.quiet
    }

    /// A notice for people, on stderr.
    pub fn notice(&self, text: &str) {
        if !self.global.quiet {
            output::notice(text);
        }
    }

    /// A progress bar, hidden where nobody would see it.
    pub fn progress(&self, what: &str) -> Progress {
        Progress::new(what, !self.global.quiet)
    }

    /// Prints the document in JSON, or else calls `text`.
    pub fn print(&self, document: &serde_json::Value, text: impl FnOnce() -> String) -> Result<()> {
        output::print(&if self.json() { format!("{document:#}\n") } else { text() })
    }

    pub fn state_directory(&self) -> PathBuf {
        match &self.global.state_dir {
            Some(path) => path.clone(),
            None => state_dir(&|name| std::env::var(name).ok(), rustix::process::geteuid().is_root()),
        }
    }

    /// Where the repository is, as its URL says.
    pub fn location(&self) -> Result<Location> {
        match self.global.repo.as_deref().filter(|url| !url.is_empty()) {
            Some(url) => Location::parse(url),
            None => Err(Error::usage("no repository is named")
                .hint("give --repo DIR or s3://BUCKET/PREFIX, or set EPOCHFS_REPO")),
        }
    }

    /// Whether a repository is named at all.
    pub fn names_repository(&self) -> bool {
        self.global.repo.as_deref().is_some_and(|url| !url.is_empty())
    }

    /// Where to look for the keys of encrypted repositories.
    pub fn keys(&self) -> &KeySettings {
        &self.keys
    }

    /// With what a process is started that is to find the same keys; what the environment says it inherits.
    pub fn key_arguments(&self) -> Result<Vec<OsString>> {
        Ok(self.key_files()?.into_iter().flat_map(|file| ["--key-file".into(), file.into()]).collect())
    }

    /// The files among them, as seen from any working directory.
    pub fn key_files(&self) -> Result<Vec<PathBuf>> {
        let absolute = |file: &PathBuf| {
            std::path::absolute(file)
                .map_err(|error| Error::io(format!("the path of the key file {}", file.display()), error))
        };
        self.keys.files().map(absolute).collect()
    }

    /// Opens the repository.
    pub fn open(&self) -> Result<EpochStore> {
        Ok(self.open_without_index()?.with_state(self.state_directory()))
    }

    /// Opens the repository with these keys, for whoever needs none of what is in it.
    pub fn open_repository(&self, keys: &KeySettings) -> Result<Repository> {
        Repository::open_with(open_store(&self.location()?)?, keys)
    }

    /// Opens the repository for whoever need not find pages of other epochs.
    pub fn open_without_index(&self) -> Result<EpochStore> {
        let (location, state) = (self.location()?, self.state_directory());
        let mut repository = Repository::open_with(open_store(&location)?, &self.keys)?;
        // What a bucket's service says travels far; what it said once need not travel again.
        if location.directory().is_none() && self.global.cache_size > 0 {
            let directory = repository.local_directory(&state).join("cache");
            repository = repository.cached(CacheSettings { directory, len_max: self.global.cache_size });
        }
        // Collectors name those who read by it.
        let host = host_name(&repository.local_directory(&state));
        Ok(EpochStore::new(repository).with_leases(LeaseSettings { host, ..LeaseSettings::default() }))
    }

    /// Opens the repository to look at what the store has, and not at what was kept of it.
    pub fn open_without_cache(&self) -> Result<EpochStore> {
        Ok(EpochStore::open_with(&self.location()?, &self.keys)?.with_state(self.state_directory()))
    }

    /// Opens another repository, with this host's state of it.
    pub fn open_other(&self, url: &str) -> Result<EpochStore> {
        Ok(EpochStore::open_with(&Location::parse(url)?, &self.keys)?.with_state(self.state_directory()))
    }

    /// Where this host keeps what belongs to an opened repository.
    pub fn local_directory(&self, store: &EpochStore) -> PathBuf {
        store.repository().local_directory(&self.state_directory())
    }

    /// What this host keeps of a bucket's objects, if it keeps any.
    pub fn block_cache(&self, store: &EpochStore) -> Result<Option<Arc<Cache>>> {
        if self.location()?.directory().is_some() || self.global.cache_size == 0 {
            return Ok(None);
        }
        let directory = self.local_directory(store).join("cache");
        Ok(Some(Arc::new(Cache::new(CacheSettings { directory, len_max: self.global.cache_size }))))
    }

    /// The socket of the daemon that has the repository mounted here, or would be.
    pub fn socket(&self) -> Result<PathBuf> {
        // A daemon of a bucket is found without asking the bucket, which may be away.
        if self.location()?.directory().is_none()
            && let Some(path) = self.socket_of_daemon()?
        {
            return Ok(path);
        }
        self.own_socket()
    }

    /// The socket that this host's daemon would have, by what the repository says of itself.
    pub fn own_socket(&self) -> Result<PathBuf> {
        Ok(socket_path(&self.local_directory(&self.open()?)))
    }

    /// The socket of the daemon that has the repository mounted here, whether or not the repository is there.
    pub fn socket_of_daemon(&self) -> Result<Option<PathBuf>> {
        let url = self.location()?.absolute()?.to_string();
        for path in sockets(&self.state_directory()) {
            if Client::ask(&path, Client::ping)?.is_some_and(|who| who.repository == url) {
                return Ok(Some(path));
            }
        }
        Ok(None)
    }

    /// How much of a bucket may be kept on a local disk.
    pub fn cache_size(&self) -> u64 {
        self.global.cache_size
    }

    /// Whether the logs that the user asked for are more, or fewer, than usual.
    pub fn verbosity(&self) -> (u8, bool) {
        (self.global.verbose, self.global.quiet)
    }

    /// Opens the page index now, and shows the progress if it must be rebuilt.
    pub fn open_index(&self, store: &EpochStore) {
        let bar = self.progress("rebuilding the page index");
        let shown = bar.clone();
        let (_, rebuilt) = store.index(Some(Box::new(move |done, total| shown.set_items(done, total))));
        bar.finish();
        if let Some(rebuilt) = rebuilt
            && rebuilt.objects > 0
        {
            self.notice(&format!("rebuilt the page index from {} objects: {}", rebuilt.objects, rebuilt.reason));
        }
    }
}
