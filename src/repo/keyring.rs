//! The keys to a sealed repository: its data key, made once, lies wrapped under each operator's key that opens it.
//!
//! Adding one is a put under a name of its own. Removals are numbered, and creating the next one decides: each is checked
//! against all before it, so that two at once never remove the last two keys, and a key that was removed stays so.

use std::sync::Arc;

use epochfs_format::{
    KEY_REMOVALS_PREFIX, KEYS_PREFIX, KeyRemoval, WrappedKey, hex, key_removal_key, parse_id, record_seq,
    wrapped_key_key,
};

use crate::error::{Error, Kind, Result};
use crate::platform::keys::{KeySettings, Secret};
use crate::platform::store::{Put, Store, get_small, keys_below};
use crate::platform::{clock, random};

/// More than any object of the keyring has.
const LEN_MAX: u64 = 4096;

/// A put of which a remote store does not say what became is tried so often.
const PUT_TRIES: usize = 3;

/// What says that a key opens the repository.
#[derive(Clone, Debug)]
pub struct KeyEntry {
    /// Of the operator's key, in this repository.
    pub id: [u8; 16],
    /// When it was added; none if the object that says so is damaged.
    pub created_ns: Option<u64>,
    /// Whether it is one of those that this process was given.
    pub is_given: bool,
}

/// The keys of one repository.
pub struct Keyring {
    store: Arc<dyn Store>,
    repository: [u8; 16],
    data_key: Secret,
}

/// How to give a key.
const HOW_TO_GIVE: &str = "give it with --key-file FILE, EPOCHFS_KEY_FILE, EPOCHFS_KEY or EPOCHFS_KEY_COMMAND; `epochfs key --help` tells more";

impl Keyring {
    /// Makes a data key, and puts it under the operator's key into the store. The repository does not exist yet.
    pub fn create(store: Arc<dyn Store>, repository: [u8; 16], settings: &KeySettings) -> Result<Self> {
        let Some(operators) = settings.first()? else {
            let url = store.url();
            return Err(Error::usage(format!("{url} is to be encrypted, and no key is given"))
                .hint(format!("`epochfs key generate FILE` makes one; {HOW_TO_GIVE}")));
        };
        let keyring = Self { store, repository, data_key: Secret::random() };
        keyring.add(operators)?;
        Ok(keyring)
    }

    /// Finds the data key with one of the operator's keys.
    pub fn open(store: Arc<dyn Store>, repository: [u8; 16], settings: &KeySettings) -> Result<Self> {
        let url = store.url();
        let (mut ids, mut damaged, mut unread) = (Vec::new(), None, None);
        for keys in settings.places() {
            // It may be another that opens it.
            let keys = keys.unwrap_or_else(|error| {
                unread.get_or_insert(error);
                &[]
            });
            for operators in keys {
                let id = operators.id_in(&repository);
                match unwrap(&*store, &repository, operators) {
                    // What is left of a removed one, or came late, opens nothing.
                    Ok(_) if removed(&*store, &repository)?.contains(&id) => {}
                    Ok(data_key) => {
                        unread.iter().for_each(|error| tracing::warn!("a key is left out: {error}"));
                        return Ok(Self { store, repository, data_key });
                    }
                    Err(error) if error.kind() == Kind::NotFound => {}
                    Err(error) if error.kind() == Kind::Damaged => damaged = Some(error),
                    Err(error) => return Err(error),
                }
                ids.push(hex(&id));
            }
        }
        if let Some(error) = damaged {
            return Err(error.hint("another key that opens the repository may be whole: `epochfs key list` lists them"));
        }
        if let Some(error) = unread {
            return Err(error.context(format!("{url} is encrypted")));
        }
        let which = match &ids[..] {
            [] => "no key is given".to_owned(),
            [id] => format!("the key that is given ({id}) does not open it"),
            ids => format!("none of the keys that are given opens it ({})", ids.join(", ")),
        };
        Err(Error::usage(format!("{url} is encrypted, and {which}")).hint(HOW_TO_GIVE))
    }

    /// The id of the repository that they are the keys of.
    pub fn repository(&self) -> &[u8; 16] {
        &self.repository
    }

    pub fn data_key(&self) -> &Secret {
        &self.data_key
    }

    /// The keys that open the repository, as far as they are not removed.
    pub fn list(&self, settings: &KeySettings) -> Result<Vec<KeyEntry>> {
        let given: Vec<[u8; 16]> = settings.keys().iter().map(|key| key.id_in(&self.repository)).collect();
        let (ids, removed) = self.read()?;
        let mut entries = Vec::new();
        for id in ids.into_iter().filter(|id| !removed.contains(id)) {
            match self.entry(&id) {
                Ok(wrapped) => {
                    let created_ns = wrapped.map(|wrapped| wrapped.created_ns);
                    entries.push(KeyEntry { id, created_ns, is_given: given.contains(&id) });
                }
                // Removed since.
                Err(error) if error.kind() == Kind::NotFound => {}
                Err(error) => return Err(error),
            }
        }
        Ok(entries)
    }

    /// What is stored for a key; none if it is damaged.
    fn entry(&self, id: &[u8; 16]) -> Result<Option<WrappedKey>> {
        let bytes = get_small(&*self.store, &wrapped_key_key(id), LEN_MAX);
        match bytes.and_then(|bytes| Ok(WrappedKey::decode(&bytes, &self.repository, id)?)) {
            Ok(wrapped) => Ok(Some(wrapped)),
            Err(error) if error.kind() == Kind::Damaged => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Has the repository opened by this key too, and proves that it does. One that opens it already stays as it is.
    pub fn add(&self, operators: &Secret) -> Result<[u8; 16]> {
        let id = operators.id_in(&self.repository);
        if self.removals()?.iter().any(|removal| removal.id == id) {
            return Err(Error::conflict(format!("the key {} was removed from {}, and stays so", hex(&id), self.url()))
                .hint("make another: epochfs key generate FILE"));
        }
        let bytes = operators.wrap(&self.data_key, &self.repository, clock::now_ns()).encode();
        self.put(&wrapped_key_key(&id), &bytes)?;
        let found = unwrap(&*self.store, &self.repository, operators)?;
        if self.removals()?.iter().any(|removal| removal.id == id) {
            self.store.delete(&wrapped_key_key(&id))?;
            return Err(Error::conflict(format!("the key {} was removed from {} meanwhile", hex(&id), self.url())));
        }
        match found == self.data_key {
            true => Ok(id),
            false => Err(Error::damaged(format!("the key {} holds another data key", wrapped_key_key(&id)))),
        }
    }

    /// Has the repository opened by this key no longer. One of the operator's other keys must open it still.
    pub fn remove(&self, id: &[u8; 16], settings: &KeySettings) -> Result<()> {
        let keys = settings.keys();
        let writer = random::id16();
        loop {
            let removals = self.removals()?;
            let is_removed = |id: &[u8; 16]| removals.iter().any(|removal| removal.id == *id);
            if is_removed(id) {
                break;
            }
            if !self.read()?.0.contains(id) {
                return Err(Error::not_found(format!("no key {} opens {}", hex(id), self.url()))
                    .hint("`epochfs key list` lists those that do"));
            }
            let stays = |key: &Secret| {
                let other = key.id_in(&self.repository);
                other != *id
                    && !is_removed(&other)
                    && unwrap(&*self.store, &self.repository, key).is_ok_and(|found| found == self.data_key)
            };
            if !keys.iter().any(|key| stays(key)) {
                let id = hex(id);
                return Err(Error::usage(format!("without the key {id} none that is given would open {}", self.url()))
                    .hint("give another key that opens it, too: `epochfs key add FILE` adds one, --key-file gives several"));
            }
            let number = removals.len() as u64 + 1;
            let removal = KeyRemoval { repository: self.repository, number, id: *id, writer };
            // If the number is taken, by somebody else or by our own try, what is there decides.
            self.put(&key_removal_key(number), &removal.encode())?;
        }
        // From here on it counts for none; what is left of it goes.
        self.store.delete(&wrapped_key_key(id))
    }

    /// Has the repository opened by this key and no other.
    pub fn rotate(&self, operators: &Secret, settings: &KeySettings) -> Result<Vec<[u8; 16]>> {
        let id = self.add(operators)?;
        let with_new = settings.clone().with_key(operators.clone());
        let others: Vec<[u8; 16]> = self.read()?.0.into_iter().filter(|other| *other != id).collect();
        others.iter().try_for_each(|other| self.remove(other, &with_new))?;
        Ok(others)
    }

    fn url(&self) -> String {
        self.store.url()
    }

    /// Puts an object unless its name is taken, until it is known to be there.
    fn put(&self, key: &str, bytes: &[u8]) -> Result<Put> {
        for _ in 1..PUT_TRIES {
            match self.store.put_if_absent(key, &[bytes]) {
                Err(error) if error.kind() == Kind::Unavailable => tracing::warn!("{error}: trying again"),
                known => return known,
            }
        }
        self.store.put_if_absent(key, &[bytes])
    }

    /// The ids of all keys that are stored, and of those that are removed, whatever is still there of them.
    fn read(&self) -> Result<(Vec<[u8; 16]>, Vec<[u8; 16]>)> {
        let mut ids = Vec::new();
        self.store.list(KEYS_PREFIX, None, &mut |info| {
            ids.extend(info.key.strip_prefix(KEYS_PREFIX).and_then(parse_id));
            Ok(true)
        })?;
        Ok((ids, self.removals()?.into_iter().map(|removal| removal.id).collect()))
    }

    /// All removals, in their order. A listing may lag behind: the next number is looked for.
    fn removals(&self) -> Result<Vec<KeyRemoval>> {
        let mut listed = 0;
        self.store.list(KEY_REMOVALS_PREFIX, None, &mut |info| {
            listed = listed.max(record_seq(&info.key).unwrap_or(0));
            Ok(true)
        })?;
        let mut removals = Vec::new();
        for number in 1.. {
            let key = key_removal_key(number);
            match get_small(&*self.store, &key, LEN_MAX) {
                Ok(bytes) => {
                    removals.push(removal(&bytes, &self.repository, number)?);
                }
                Err(error) if error.kind() == Kind::NotFound && number > listed => break,
                Err(error) => return Err(error),
            }
        }
        Ok(removals)
    }
}

/// The ids of removed keys, as far as a listing tells.
fn removed(store: &dyn Store, repository: &[u8; 16]) -> Result<Vec<[u8; 16]>> {
    let mut ids = Vec::new();
    for key in keys_below(store, KEY_REMOVALS_PREFIX)? {
        let Some(number) = record_seq(&key) else { continue };
        ids.push(removal(&get_small(store, &key, LEN_MAX)?, repository, number)?.id);
    }
    Ok(ids)
}

fn removal(bytes: &[u8], repository: &[u8; 16], number: u64) -> Result<KeyRemoval> {
    let removal = KeyRemoval::decode(bytes, repository, number);
    removal.map_err(|error| Error::from(error).context(key_removal_key(number)))
}

/// The data key, by an operator's key. Not found if that does not open the repository.
fn unwrap(store: &dyn Store, repository: &[u8; 16], operators: &Secret) -> Result<Secret> {
    let id = operators.id_in(repository);
    let key = wrapped_key_key(&id);
    let bytes = get_small(store, &key, LEN_MAX)?;
    let wrapped = WrappedKey::decode(&bytes, repository, &id).map_err(|error| Error::from(error).context(&key))?;
    operators
        .unwrap(&wrapped)
        .ok_or_else(|| Error::damaged(format!("object {key} in {} is not what was wrapped with its key", store.url())))
}
