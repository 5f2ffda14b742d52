//! The command line of a QEMU that starts from an epoch: the user's own, and what a restore adds to it.

use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};

use serde_json::{Value, json};

use super::place::{Place, text};
use super::qemu_state::RamBlock;
use super::qmp::file_channel;
use crate::error::{Error, Result};

/// The file that is the machine's RAM.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Memory {
    pub file: PathBuf,
    pub len: u64,
    /// What the backend was called when the state was saved.
    pub name: String,
    /// Whether what the machine writes goes to the file, or stays with QEMU.
    pub is_shared: bool,
}

/// Where the machine's RAM comes from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Ram {
    File(Memory),
    /// Its pages are in the state.
    InState(RamBlock),
}

impl Ram {
    fn len(&self) -> u64 {
        match self {
            Self::File(memory) => memory.len,
            Self::InState(block) => block.len,
        }
    }

    fn name(&self) -> &str {
        match self {
            Self::File(memory) => &memory.name,
            Self::InState(block) => &block.name,
        }
    }
}

/// What QEMU calls the RAM of a machine for which nobody named a backend: nobody else can have that name.
const DEFAULT_NAME: &str = "pc.ram";

/// How QEMU is started, and what it is told then.
#[derive(Clone, Debug, PartialEq)]
pub struct CommandLine {
    pub words: Vec<OsString>,
    /// Names and arguments of QMP commands. The state is waited for before the last one, `cont`, if that is wanted.
    pub commands: Vec<(&'static str, Value)>,
}

/// Options that say what a restore says itself, and what to do instead.
const TAKEN: [(&str, &str); 5] = [
    ("-S", "give --paused to `epochfs restore` instead"),
    ("-incoming", "leave it out: the state is loaded by this command"),
    ("-daemonize", "give --detach to `epochfs restore` instead"),
    ("-mem-path", "leave it out: the memory is a file of the epoch or of the clone"),
    ("-loadvm", "leave it out: the machine goes on from the epoch"),
];

impl CommandLine {
    pub fn new(
        user: &[OsString],
        place: &Place,
        ram: &Ram,
        monitor: &Path,
        state: &Path,
        paused: bool,
    ) -> Result<Self> {
        if user.is_empty() {
            return Err(Error::usage("it is not said how to start QEMU").hint(format!(
                "give its command line, without memory: epochfs restore {} -- qemu-system-x86_64 -machine q35 ...",
                place.name()
            )));
        }
        let mut words = Vec::with_capacity(user.len() + 12);
        for word in user {
            words.push(fill(word, place)?);
        }
        // Whoever gives it nodes says what memory they have.
        let has_nodes = matches!(ram, Ram::InState(_)) && user.iter().any(|word| word == "-numa" || word == "--numa");
        let is_size_given = has_nodes || check(user, ram.len(), place)?;
        let (len, name) = (ram.len(), ram.name());
        if name.contains([',', '=']) {
            return Err(Error::usage(format!("{}: a backend cannot be called {name:?}", place.name())));
        }
        let backend = match ram {
            Ram::File(Memory { file, is_shared, .. }) => {
                let how = if *is_shared { "share=on" } else { "share=off,readonly=on,rom=off" };
                Some(format!("memory-backend-file,id={name},size={len},mem-path={},{how}", escape(text(file)?)))
            }
            Ram::InState(_) if has_nodes || name == DEFAULT_NAME => None,
            Ram::InState(_) => Some(format!("memory-backend-ram,id={name},size={len}")),
        };
        let mut add = |option: &str, value: String| words.extend([OsString::from(option), value.into()]);
        if !is_size_given {
            add("-m", format!("size={}K", len / 1024));
        }
        if let Some(backend) = backend {
            add("-object", backend);
            // QEMU merges it with what the user says of the machine.
            add("-machine", format!("memory-backend={name}"));
        }
        add("-incoming", "defer".to_owned());
        add("-qmp", format!("unix:{},server=on,wait=off", escape(text(monitor)?)));
        // A state that was saved by a running machine would go on by itself.
        words.push("-S".into());
        let capabilities: &[&str] = match ram {
            Ram::File(_) => &["x-ignore-shared"],
            // Pages are read by several threads.
            Ram::InState(_) => &["mapped-ram", "multifd"],
        };
        let capabilities: Vec<Value> =
            capabilities.iter().map(|name| json!({"capability": name, "state": true})).collect();
        let mut commands = vec![
            ("migrate-set-capabilities", json!({"capabilities": capabilities})),
            ("migrate-incoming", file_channel(state)?),
        ];
        if !paused {
            commands.push(("cont", Value::Null));
        }
        Ok(Self { words, commands })
    }

    /// The command line as a shell takes it.
    pub fn shell(&self) -> String {
        self.words.iter().map(|word| quoted(&word.to_string_lossy())).collect::<Vec<_>>().join(" ")
    }

    /// The QMP commands, a document each.
    pub fn documents(&self) -> Vec<Value> {
        self.commands
            .iter()
            .map(|(name, arguments)| match arguments {
                Value::Null => json!({"execute": name}),
                arguments => json!({"execute": name, "arguments": arguments}),
            })
            .collect()
    }
}

/// Checks what the user says; whether the size of the memory is among it.
fn check(user: &[OsString], len: u64, place: &Place) -> Result<bool> {
    let mut is_size_given = false;
    for (at, word) in user.iter().enumerate().skip(1) {
        let word = word.to_string_lossy();
        let option = if word.starts_with("--") { &word[1..] } else { &*word };
        let value = user.get(at + 1).map(|value| value.to_string_lossy()).unwrap_or_default();
        if let Some((taken, instead)) = TAKEN.iter().find(|(taken, _)| *taken == option) {
            return Err(Error::usage(format!("QEMU's {taken} has no place in a restore")).hint(*instead));
        }
        match option {
            "-machine" | "-M" if value.split(',').any(|part| part.starts_with("memory-backend=")) => {
                return Err(Error::usage("QEMU's command line names a memory backend of its own")
                    .hint("leave the backend and memory-backend= out: both are added"));
            }
            "-m" => {
                let size = memory_size(&value)
                    .ok_or_else(|| Error::usage(format!("-m {value}: it is not understood how much that is")))?;
                if size != len {
                    return Err(Error::usage(format!(
                        "-m {value} is {size} bytes, and the memory of {} has {len}",
                        place.name()
                    ))
                    .hint("leave -m out, or give the machine what it had"));
                }
                is_size_given = true;
            }
            _ => {}
        }
    }
    Ok(is_size_given)
}

/// What `-m` says, in bytes: MiB unless there is a unit.
fn memory_size(value: &str) -> Option<u64> {
    let size = value.split(',').enumerate().find_map(|(at, part)| match part.split_once('=') {
        Some(("size", size)) => Some(size),
        None if at == 0 => Some(part),
        _ => None,
    })?;
    let digits = size.trim_end_matches(|letter: char| letter.is_ascii_alphabetic());
    let shift = match size[digits.len()..].to_ascii_lowercase().as_str() {
        "b" => 0,
        "k" => 10,
        "" | "m" => 20,
        "g" => 30,
        "t" => 40,
        _ => return None,
    };
    let number: f64 = digits.parse().ok().filter(|number: &f64| number.is_finite() && *number >= 0.0)?;
    Some((number * f64::from(1_u32 << (shift % 30)) * f64::from(1_u32 << (shift / 30 * 30))) as u64)
}

/// Puts directories where the user left room for them.
fn fill(word: &OsStr, place: &Place) -> Result<OsString> {
    let directories = [
        ("{epoch}", Some(place.epoch_directory())),
        ("{live}", place.live_directory()),
        ("{machine}", Some(place.machine_directory())),
    ];
    // In a list of options a comma is written twice.
    let is_list = word.as_bytes().contains(&b'=') && !word.as_bytes().starts_with(b"{");
    let (mut filled, mut rest) = (Vec::new(), word.as_bytes());
    // What is put in is not looked at again: a machine's name may have such a word in it.
    while let Some((first, behind)) = rest.split_first() {
        let Some((name, directory)) = directories.iter().find(|(name, _)| rest.starts_with(name.as_bytes())) else {
            filled.push(*first);
            rest = behind;
            continue;
        };
        let Some(directory) = directory else {
            return Err(Error::usage(format!("{name} in QEMU's command line: nothing there would be written to"))
                .hint("clone the epoch, with --clone NAME; or use {epoch}, with snapshot=on"));
        };
        let directory = text(directory)?;
        let directory = if is_list { escape(directory) } else { directory.to_owned() };
        filled.extend_from_slice(directory.as_bytes());
        rest = &rest[name.len()..];
    }
    Ok(OsString::from_vec(filled))
}

fn escape(value: &str) -> String {
    value.replace(',', ",,")
}

fn quoted(word: &str) -> String {
    let is_plain = |letter: char| letter.is_ascii_alphanumeric() || "-_./=:,@%+".contains(letter);
    if !word.is_empty() && word.chars().all(is_plain) {
        return word.to_owned();
    }
    format!("'{}'", word.replace('\'', "'\\''"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn place(clone: Option<&str>) -> Place {
        Place { mountpoint: "/mnt/a,b".into(), machine: "web1".into(), epoch: 42, clone: clone.map(str::to_owned) }
    }

    fn line(user: &[&str], clone: Option<&str>, paused: bool) -> Result<CommandLine> {
        let place = place(clone);
        let memory = Memory {
            file: place.directory().join("memory"),
            len: 1 << 30,
            name: "ram".into(),
            is_shared: clone.is_some(),
        };
        line_of(user, &place, &Ram::File(memory), paused)
    }

    fn line_of(user: &[&str], place: &Place, ram: &Ram, paused: bool) -> Result<CommandLine> {
        let user: Vec<OsString> = user.iter().map(OsString::from).collect();
        CommandLine::new(&user, place, ram, Path::new("/run/qmp"), &place.directory().join("vmstate"), paused)
    }

    #[test]
    fn memory_that_is_in_the_state_is_loaded_from_there() {
        let ram = |name: &str| Ram::InState(RamBlock { name: name.into(), len: 1 << 30, is_mapped: true });
        let line = |user: &[&str], name: &str| line_of(user, &place(Some("web2")), &ram(name), false).unwrap();
        let usual = line(&["qemu"], "pc.ram");
        assert_eq!(usual.shell(), "qemu -m size=1048576K -incoming defer -qmp unix:/run/qmp,server=on,wait=off -S");
        let capabilities = &usual.documents()[0]["arguments"]["capabilities"];
        assert_eq!(capabilities[0], json!({"capability": "mapped-ram", "state": true}));
        let named = line(&["qemu", "-m", "1G"], "ram0").shell();
        let backend = "-object memory-backend-ram,id=ram0,size=1073741824 -machine memory-backend=ram0";
        assert!(named.contains(backend), "{named}");
        let nodes = line(&["qemu", "-m", "2G", "-numa", "node,memdev=ram0"], "ram0").shell();
        assert!(!nodes.contains("-object"), "{nodes}");
        assert!(line_of(&["qemu", "-m", "2G"], &place(None), &ram("pc.ram"), false).is_err());
    }

    #[test]
    fn what_is_put_in_is_not_looked_at_again() {
        let odd = Place { machine: "a{epoch}{live}".into(), ..place(None) };
        let filled = fill(OsStr::new("file={epoch}/x"), &odd).unwrap();
        assert_eq!(filled, "file=/mnt/a,,b/a{epoch}{live}/epochs/42/x");
    }

    #[test]
    fn what_a_restore_needs_is_added() {
        let made = line(&["qemu", "-M", "q35", "-drive", "file={epoch}/disk0,snapshot=on"], None, false).unwrap();
        assert_eq!(
            made.shell(),
            "qemu -M q35 -drive file=/mnt/a,,b/web1/epochs/42/disk0,snapshot=on -m size=1048576K -object \
             memory-backend-file,id=ram,size=1073741824,mem-path=/mnt/a,,b/web1/epochs/42/memory,share=off,readonly=on,rom=off \
             -machine memory-backend=ram -incoming defer -qmp unix:/run/qmp,server=on,wait=off -S"
        );
        let documents = made.documents();
        assert_eq!(documents.len(), 3);
        assert_eq!(documents[1]["arguments"]["channels"][0]["addr"]["filename"], "/mnt/a,b/web1/epochs/42/vmstate");
        assert_eq!(documents[2], json!({"execute": "cont"}));
        let clone = line(&["qemu", "-m", "1G", "{live}/disk0", "{machine}"], Some("web2"), true).unwrap();
        let text = clone.shell();
        assert!(text.contains("mem-path=/mnt/a,,b/web2/live/memory,share=on ") && !text.contains("size=1048576K"));
        assert!(text.contains(" /mnt/a,b/web2/live/disk0 /mnt/a,b/web2 "), "{text}");
        assert_eq!(clone.documents().len(), 2);
    }

    #[test]
    fn what_cannot_be_is_refused() {
        let refused: [(&[&str], &str); 11] = [
            (&["qemu", "-S"], "-S"),
            (&[], "how to start QEMU"),
            (&["qemu", "-incoming", "defer"], "-incoming"),
            (&["qemu", "--daemonize"], "-daemonize"),
            (&["qemu", "-mem-path", "/x"], "-mem-path"),
            (&["qemu", "-loadvm", "x"], "-loadvm"),
            (&["qemu", "-machine", "q35,memory-backend=x"], "backend of its own"),
            (&["qemu", "-m", "512"], "-m 512 is 536870912 bytes, and the memory of web1@42 has 1073741824"),
            (&["qemu", "-m", "much"], "not understood"),
            (&["qemu", "-m"], "not understood"),
            (&["qemu", "-drive", "file={live}/disk0"], "{live}"),
        ];
        for (user, text) in refused {
            let error = line(user, None, false).unwrap_err();
            assert!(error.to_string().contains(text) && error.exit_code() == 2, "{error}");
        }
    }

    #[test]
    fn sizes_are_understood_as_qemu_does() {
        for (text, size) in [
            ("1024", 1 << 30),
            ("1G", 1 << 30),
            ("size=1.5g,slots=2", 3 << 29),
            ("slots=2,size=1048576K", 1 << 30),
            ("1T", 1 << 40),
            ("1073741824b", 1 << 30),
        ] {
            assert_eq!(memory_size(text), Some(size), "{text}");
        }
        for text in ["", "slots=2", "1X", "G", "-1", "inf"] {
            assert_eq!(memory_size(text), None, "{text}");
        }
    }

    #[test]
    fn words_are_quoted_for_a_shell() {
        assert_eq!(
            [quoted("a=b,c"), quoted("a b"), quoted("it's"), quoted("")],
            ["a=b,c", "'a b'", "'it'\\''s'", "''"]
        );
    }
}
