//! `epochfs key`

use std::fs::OpenOptions;
use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;

use epochfs_format::{hex, parse_id};
use serde_json::json;

use super::context::Context;
use super::output::{table, time};
use crate::error::{Error, Result};
use crate::platform::keys::{KeySettings, Secret, read_keys};
use crate::repo::Keyring;

/// The keys of an encrypted repository: make one, and say which open it.
///
/// What a repository stores is encrypted with a key of its own, which lies there too, encrypted with yours. So yours can be
/// changed in a moment, and several can open a repository at once. Your key is 256 bits, as 64 hexadecimal digits or in
/// base64, and is found in a file that nobody else may read (--key-file or EPOCHFS_KEY_FILE), in the variable EPOCHFS_KEY,
/// or in what a command prints (EPOCHFS_KEY_COMMAND, by the shell, within 30 s). All that are given are tried, so one file
/// with a key a line serves several repositories. Who loses all keys that open a repository has lost what is in it.
#[derive(clap::Args)]
#[command(
    after_help = "Examples:\n  epochfs key generate /etc/epochfs/key\n  epochfs --repo /srv/epochs --key-file /etc/epochfs/key init --encrypt\n  EPOCHFS_KEY_COMMAND='vault kv get -field=key secret/epochfs' epochfs --repo /srv/epochs key list\n  epochfs --repo /srv/epochs --key-file /etc/epochfs/key key rotate /etc/epochfs/key.new"
)]
pub struct Key {
    #[command(subcommand)]
    command: KeyCommand,
}

#[derive(clap::Subcommand)]
enum KeyCommand {
    Generate(Generate),
    List(List),
    Add(Add),
    Remove(Remove),
    Rotate(Rotate),
}

impl Key {
    pub fn run(&self, context: &Context) -> Result<ExitCode> {
        match &self.command {
            KeyCommand::Generate(command) => command.run(context),
            KeyCommand::List(command) => command.run(context),
            KeyCommand::Add(command) => command.run(context),
            KeyCommand::Remove(command) => command.run(context),
            KeyCommand::Rotate(command) => command.run(context),
        }?;
        Ok(ExitCode::SUCCESS)
    }
}

/// Make a key: in a new file that only its owner can read, or else on standard output.
///
/// Keep a copy where the repository is not.
#[derive(clap::Args)]
#[command(
    after_help = "Examples:\n  epochfs key generate /etc/epochfs/key\n  epochfs key generate | vault kv put secret/epochfs key=-"
)]
struct Generate {
    /// The file to make. One that exists is never written over.
    file: Option<PathBuf>,
}

impl Generate {
    fn run(&self, context: &Context) -> Result<()> {
        let text = Secret::random().to_text();
        let Some(path) = &self.file else {
            return context.print(&json!({"key": text}), || format!("{text}\n"));
        };
        write_new(path, &format!("{text}\n"))?;
        context.print(&json!({"file": path}), || {
            format!("wrote a key to {}; keep a copy elsewhere: without it nothing can be read\n", path.display())
        })
    }
}

fn write_new(path: &Path, text: &str) -> Result<()> {
    let failed = |error: std::io::Error| match error.kind() {
        std::io::ErrorKind::AlreadyExists => {
            Error::conflict(format!("{} exists, and may hold a key that is needed", path.display()))
                .hint("name a new file")
        }
        _ => Error::io(format!("cannot write {}", path.display()), error),
    };
    let mut file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(path).map_err(failed)?;
    file.write_all(text.as_bytes()).and_then(|()| file.sync_all()).map_err(failed)
}

/// List the keys that open the repository.
#[derive(clap::Args)]
#[command(after_help = "Example:\n  epochfs --repo /srv/epochs --key-file /etc/epochfs/key key list")]
struct List {}

impl List {
    fn run(&self, context: &Context) -> Result<()> {
        let (keyring, url) = keyring(context)?;
        let keys = keyring.list(context.keys())?;
        let documents: Vec<_> = keys
            .iter()
            .map(|key| {
                json!({"id": hex(&key.id), "created_ns": key.created_ns, "damaged": key.created_ns.is_none(),
                    "given": key.is_given})
            })
            .collect();
        context.print(&json!({"repository": url, "keys": documents}), || {
            let rows: Vec<Vec<String>> = keys
                .iter()
                .map(|key| {
                    let created = key.created_ns.map_or("damaged".to_owned(), time);
                    vec![hex(&key.id), created, if key.is_given { "given" } else { "" }.to_owned()]
                })
                .collect();
            table(&["key", "added", ""], &rows)
        })
    }
}

/// Have the repository opened by another key, too.
#[derive(clap::Args)]
#[command(after_help = "Example:\n  epochfs --repo /srv/epochs --key-file /etc/epochfs/key key add /root/spare.key")]
struct Add {
    /// The file with the other key.
    file: PathBuf,
}

impl Add {
    fn run(&self, context: &Context) -> Result<()> {
        let (keyring, url) = keyring(context)?;
        let id = hex(&keyring.add(&new_key(&self.file)?)?);
        context.print(&json!({"repository": url, "added": id}), || format!("{url} is opened by the key {id}, too\n"))
    }
}

/// Have the repository opened by a key no longer.
///
/// Another key that opens it must be given. Who had the removed key and has read the repository may have kept what that
/// opened: what was stored until then is not encrypted anew. Copy it to a new repository if that matters.
#[derive(clap::Args)]
#[command(
    after_help = "Example:\n  epochfs --repo /srv/epochs --key-file /etc/epochfs/key key remove 0f3a5c7e9b1d2f4a6c8e0f3a5c7e9b1d"
)]
struct Remove {
    /// The key's id, as `epochfs key list` shows it.
    id: String,
}

impl Remove {
    fn run(&self, context: &Context) -> Result<()> {
        let (keyring, url) = keyring(context)?;
        let Some(id) = parse_id(&self.id) else {
            return Err(Error::usage(format!("{:?} is no id of a key", self.id)).hint("`epochfs key list` shows them"));
        };
        keyring.remove(&id, context.keys())?;
        let id = &self.id;
        context.print(&json!({"repository": url, "removed": id}), || {
            format!("{url} is opened by the key {id} no longer\n")
        })
    }
}

/// Have the repository opened by a new key, and by no other.
///
/// It is opened by the new one before it is opened by others no longer: whatever interrupts this, one does, and the same
/// command again goes on. Give the new key to all hosts, beside the old one, before their old one is removed.
#[derive(clap::Args)]
#[command(
    after_help = "Example:\n  epochfs key generate /etc/epochfs/key.new\n  epochfs --repo /srv/epochs --key-file /etc/epochfs/key key rotate /etc/epochfs/key.new"
)]
struct Rotate {
    /// The file with the new key.
    file: PathBuf,
}

impl Rotate {
    fn run(&self, context: &Context) -> Result<()> {
        let new = new_key(&self.file)?;
        let keys = context.keys().clone().with_key(new.clone());
        let (keyring, url) = keyring_with(context, &keys)?;
        let removed = keyring.rotate(&new, &keys)?;
        let id = hex(&new.id_in(keyring.repository()));
        let removed: Vec<String> = removed.iter().map(|id| hex(id)).collect();
        context.print(&json!({"repository": url, "added": id, "removed": removed}), || {
            format!("{url} is opened by the key {id} alone; {} removed\n", removed.len())
        })
    }
}

fn new_key(path: &Path) -> Result<Secret> {
    match &read_keys(path)?[..] {
        [key] => Ok(key.clone()),
        keys => Err(Error::usage(format!("{} holds {} keys, and one is wanted", path.display(), keys.len()))),
    }
}

fn keyring(context: &Context) -> Result<(Arc<Keyring>, String)> {
    keyring_with(context, context.keys())
}

fn keyring_with(context: &Context, keys: &KeySettings) -> Result<(Arc<Keyring>, String)> {
    let repository = context.open_repository(keys)?;
    let url = repository.url();
    match repository.keyring() {
        Some(keyring) => Ok((keyring.clone(), url)),
        None => Err(Error::usage(format!("{url} is not encrypted, and has no keys"))
            .hint("`epochfs init --encrypt` makes a repository that is; `epochfs copy` brings what is here there")),
    }
}
