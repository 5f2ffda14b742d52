//! Where the operator keeps keys: in files, in a variable of the environment, or behind a command that prints them.

use std::fs::File;
use std::io::Read;
use std::os::unix::fs::MetadataExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use crossbeam_channel::bounded;
use rustix::process::{Pid, Signal, kill_process_group};

use super::{Secret, text};
use crate::error::{Error, Result};
use crate::platform::store::Variables;

/// Names a file of keys.
pub const KEY_FILE_VARIABLE: &str = "EPOCHFS_KEY_FILE";
/// Holds a key.
pub const KEY_VARIABLE: &str = "EPOCHFS_KEY";
/// Holds a command of the shell that prints keys.
pub const KEY_COMMAND_VARIABLE: &str = "EPOCHFS_KEY_COMMAND";

/// How long a command may take that prints keys: it may ask a service, or a person's token.
const COMMAND_WAIT: Duration = Duration::from_secs(30);

/// More than any file of keys has.
const LEN_MAX: u64 = 64 << 10;

/// Where to look for keys: the one that fits a repository opens it. Each place is looked at when its turn comes, and once.
#[derive(Clone, Default)]
pub struct KeySettings {
    sources: Vec<Source>,
}

#[derive(Clone)]
struct Source {
    place: Place,
    found: Arc<OnceLock<Vec<Secret>>>,
}

#[derive(Clone)]
enum Place {
    File(PathBuf),
    /// What the environment holds, or why that is no key.
    Variable(std::result::Result<Secret, String>),
    Command(String),
    Given(Secret),
}

impl Source {
    fn new(place: Place) -> Self {
        Self { place, found: Arc::default() }
    }

    fn is_file(&self) -> bool {
        matches!(self.place, Place::File(_))
    }

    /// What was found stays found: a pipe can be read once, and a command may ask a person.
    fn keys(&self) -> Result<&[Secret]> {
        if let Some(found) = self.found.get() {
            return Ok(found);
        }
        let keys = match &self.place {
            Place::File(path) => read_keys(path)?,
            Place::Variable(Ok(key)) | Place::Given(key) => vec![key.clone()],
            Place::Variable(Err(why)) => {
                return Err(Error::usage(format!("{KEY_VARIABLE} is not as it should be: {why}")).hint(HOW_TO_MAKE));
            }
            Place::Command(command) => run(command, COMMAND_WAIT)?,
        };
        Ok(self.found.get_or_init(|| keys))
    }
}

impl KeySettings {
    /// Without any key.
    pub fn none() -> Self {
        Self::default()
    }

    /// Those of this process's environment.
    pub fn of_process() -> Self {
        Self::of(&Variables::of_process())
    }

    pub fn of(variables: &Variables) -> Self {
        let files = variables.get(KEY_FILE_VARIABLE).into_iter().flat_map(|files| files.split(':'));
        let key = variables.get(KEY_VARIABLE).and_then(|text| match text::parse(text.as_bytes()) {
            Ok(keys) => keys.into_iter().next().map(Ok),
            Err(why) => Some(Err(why)),
        });
        let command = variables.get(KEY_COMMAND_VARIABLE).map(str::to_owned);
        let places = files.map(|file| Place::File(file.into())).chain(key.map(Place::Variable));
        Self { sources: places.chain(command.map(Place::Command)).map(Source::new).collect() }
    }

    /// This key, and no other.
    pub fn of_key(key: Secret) -> Self {
        Self::default().with_key(key)
    }

    /// This key too.
    #[must_use]
    pub fn with_key(mut self, key: Secret) -> Self {
        self.sources.push(Source::new(Place::Given(key)));
        self
    }

    /// These files instead of those that the environment names.
    #[must_use]
    pub fn with_files(self, files: Vec<PathBuf>) -> Self {
        if files.is_empty() {
            return self;
        }
        let files = files.into_iter().map(|file| Source::new(Place::File(file)));
        Self { sources: files.chain(self.sources.into_iter().filter(|source| !source.is_file())).collect() }
    }

    /// The files, for a process that is to find the same keys. The environment it inherits.
    pub fn files(&self) -> impl Iterator<Item = &PathBuf> {
        self.sources.iter().filter_map(|source| match &source.place {
            Place::File(path) => Some(path),
            _ => None,
        })
    }

    /// Whether any key is named.
    pub fn is_none(&self) -> bool {
        self.sources.is_empty()
    }

    /// The keys of each place, in the order in which they are tried.
    pub fn places(&self) -> impl Iterator<Item = Result<&[Secret]>> {
        self.sources.iter().map(Source::keys)
    }

    /// The first key: what is named first must be there.
    pub fn first(&self) -> Result<Option<&Secret>> {
        Ok(self.places().next().transpose()?.and_then(|keys| keys.first()))
    }

    /// All keys that can be read.
    pub fn keys(&self) -> Vec<&Secret> {
        let told = |error: &Error| tracing::warn!("a key is left out: {error}");
        self.places().filter_map(|keys| keys.inspect_err(told).ok()).flatten().collect()
    }
}

const HOW_TO_MAKE: &str = "`epochfs key generate FILE` makes one";

/// The keys in a file, which nobody else may read.
pub fn read_keys(path: &Path) -> Result<Vec<Secret>> {
    let shown = path.display();
    // Who takes the name of a file for the key itself must not find it in a log.
    if path.to_str().is_some_and(|name| name.len() == 64 && name.bytes().all(|byte| byte.is_ascii_hexdigit())) {
        return Err(Error::usage(
            "a key was given where the name of its file belongs, and may have been seen by others",
        )
        .hint("write it into a file that nobody else may read, and make another: epochfs key rotate --help"));
    }
    let failed = |error| Error::io(format!("cannot read the key file {shown}"), error);
    let file = File::open(path).map_err(failed)?;
    let metadata = file.metadata().map_err(failed)?;
    if metadata.is_file() {
        let own = rustix::process::geteuid().as_raw();
        if metadata.uid() != own && metadata.uid() != 0 {
            return Err(Error::usage(format!(
                "the key file {shown} belongs to another user, who may read and change it"
            ))
            .hint(format!("chown {own} {shown}")));
        }
        if metadata.mode() & 0o077 != 0 {
            let mode = metadata.mode() & 0o777;
            return Err(Error::usage(format!("the key file {shown} is open to others (mode {mode:04o})")).hint(
                format!("chmod 600 {shown}; if others have read it, make another key: epochfs key rotate --help"),
            ));
        }
    }
    let mut bytes = Vec::new();
    file.take(LEN_MAX + 1).read_to_end(&mut bytes).map_err(failed)?;
    let keys = keys_in(&mut bytes);
    keys.map_err(|why| Error::usage(format!("the key file {shown} is not as it should be: {why}")).hint(HOW_TO_MAKE))
}

/// Takes the keys out, and leaves zeros.
fn keys_in(bytes: &mut [u8]) -> std::result::Result<Vec<Secret>, String> {
    let keys = match bytes.len() as u64 > LEN_MAX {
        true => Err("it is too long".to_owned()),
        false => text::parse(bytes),
    };
    bytes.fill(0);
    std::hint::black_box(&bytes);
    keys
}

/// The keys that a command prints.
fn run(command: &str, patience: Duration) -> Result<Vec<Secret>> {
    let what = format!("the command that {KEY_COMMAND_VARIABLE} names");
    let failed = |error| Error::io(format!("cannot run {what}"), error);
    let mut child = Command::new("sh")
        .args(["-c", command])
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        // Of its own, so that all of it can be ended.
        .process_group(0)
        .spawn()
        .map_err(failed)?;
    let group = Pid::from_child(&child);
    let (said, hear) = bounded(1);
    if let Some(output) = child.stdout.take() {
        let read = move || {
            let mut bytes = Vec::new();
            let read = output.take(LEN_MAX + 1).read_to_end(&mut bytes);
            // Nobody listens once it took too long.
            let _ = said.send(read.map(|_| bytes));
        };
        std::thread::Builder::new().name("key-command".into()).spawn(read).map_err(failed)?;
    }
    let heard = hear.recv_timeout(patience);
    if heard.is_err() {
        // It may be gone by now.
        let _ = kill_process_group(group, Signal::KILL);
        let _ = child.wait();
        return Err(Error::usage(format!("{what} did not end within {} s", patience.as_secs()))
            .hint("run it by hand to see what it waits for"));
    }
    let status = child.wait().map_err(failed)?;
    if !status.success() {
        return Err(Error::usage(format!("{what} failed ({status})")).hint("what it says about that is above"));
    }
    let mut bytes = heard.unwrap_or_else(|_| Ok(Vec::new())).map_err(failed)?;
    keys_in(&mut bytes).map_err(|why| Error::usage(format!("what {what} prints is not as it should be: {why}")))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    fn hex(byte: u8) -> String {
        Secret::new([byte; 32]).to_text()
    }

    #[test]
    fn keys_come_from_files_the_environment_and_commands() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("key");
        std::fs::write(&file, hex(1)).unwrap();
        std::fs::set_permissions(&file, std::fs::Permissions::from_mode(0o600)).unwrap();
        let command = format!("echo {}", hex(3));
        let variables = Variables::of([
            (KEY_FILE_VARIABLE, file.to_str().unwrap()),
            (KEY_VARIABLE, &hex(2)),
            (KEY_COMMAND_VARIABLE, &command),
        ]);
        let bytes = |settings: &KeySettings| -> Vec<u8> { settings.keys().iter().map(|key| key.bytes()[0]).collect() };
        let settings = KeySettings::of(&variables);
        assert_eq!(bytes(&settings), [1, 2, 3]);
        assert!(!settings.is_none() && KeySettings::none().is_none());
        let other = dir.path().join("other");
        std::fs::write(&other, format!("{}\n{}", hex(4), hex(5))).unwrap();
        std::fs::set_permissions(&other, std::fs::Permissions::from_mode(0o400)).unwrap();
        assert_eq!(bytes(&settings.clone().with_files(vec![other])), [4, 5, 2, 3]);
        assert_eq!(bytes(&settings.with_files(vec![])), [1, 2, 3]);
    }

    #[test]
    fn each_place_is_looked_at_once_and_only_when_its_turn_comes() {
        let dir = tempfile::tempdir().unwrap();
        let runs = dir.path().join("runs");
        let command = format!("echo run >> {}; echo {}", runs.display(), hex(3));
        let variables = Variables::of([(KEY_VARIABLE, hex(2).as_str()), (KEY_COMMAND_VARIABLE, &command)]);
        let settings = KeySettings::of(&variables);
        assert_eq!(settings.first().unwrap().unwrap().bytes(), &[2; 32]);
        assert!(!runs.exists());
        let clone = settings.clone().with_key(Secret::new([4; 32]));
        assert_eq!((settings.keys().len(), settings.keys().len(), clone.keys().len()), (2, 2, 3));
        assert_eq!(std::fs::read_to_string(&runs).unwrap(), "run\n");
    }

    #[test]
    fn a_place_that_cannot_be_read_hides_no_other() {
        let dir = tempfile::tempdir().unwrap();
        let variables = Variables::of([(KEY_VARIABLE, hex(2).as_str())]);
        let settings = KeySettings::of(&variables).with_files(vec![dir.path().join("none")]);
        assert_eq!(settings.keys(), [&Secret::new([2; 32])]);
        assert!(settings.first().is_err(), "what is made with it is made with what was named first");
    }

    #[test]
    fn what_others_may_read_is_refused_and_nothing_of_it_is_told() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("key");
        std::fs::write(&file, hex(1)).unwrap();
        for mode in [0o644, 0o640, 0o620, 0o604, 0o601] {
            std::fs::set_permissions(&file, std::fs::Permissions::from_mode(mode)).unwrap();
            let error = read_keys(&file).unwrap_err();
            assert!(error.to_string().contains("open to others") && error.next_step().is_some(), "{error}");
        }
        let bad = Variables::of([(KEY_VARIABLE, "hunter2")]);
        let error = KeySettings::of(&bad).first().unwrap_err();
        assert!(error.to_string().contains(KEY_VARIABLE) && !error.to_string().contains("hunter2"), "{error}");
        assert!(read_keys(&dir.path().join("none")).is_err());
    }

    #[test]
    fn a_command_that_fails_hangs_or_babbles_is_told_of() {
        let error = run("exit 3", COMMAND_WAIT).unwrap_err().to_string();
        assert!(error.contains("failed") && error.contains('3'), "{error}");
        let error = run("sleep 60", Duration::from_millis(200)).unwrap_err().to_string();
        assert!(error.contains("did not end"), "{error}");
        assert!(run("yes", COMMAND_WAIT).is_err());
        assert!(run("true", COMMAND_WAIT).is_err());
        assert!(run("echo hello", COMMAND_WAIT).is_err());
    }
}
