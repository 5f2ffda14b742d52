//! The rules of the code's shape, checked on its text: which module may use which, where each foreign crate may appear,
//! and how long a file may be.

use std::path::{Path, PathBuf};

/// The longest file that a reader is asked to keep in mind.
const LINES_MAX: usize = 700;

/// The layers from the lowest to the highest. A module uses only modules of lower layers, and itself. The error type is
/// below all of them.
const LAYERS: [(&str, u32); 12] = [
    ("error", 0),
    ("platform", 1),
    ("repo", 2),
    ("epoch", 3),
    ("gc", 4),
    ("restore", 5),
    ("fs", 6),
    ("uffd", 6),
    ("capture", 7),
    ("vmm", 8),
    ("ha", 9),
    ("ops", 10),
];

/// Above every layer.
const TOP: [&str; 3] = ["cli", "main", "lib"];

/// Foreign crates that belong in one place each.
const CONFINED: [(&str, &[&str]); 12] = [
    ("rocksdb", &["src/repo/index"]),
    ("object_store", &["src/platform"]),
    ("async_trait", &["src/platform"]),
    ("reqwest", &["src/platform"]),
    ("rustls", &["src/platform"]),
    ("ring::aead", &["src/platform/keys", "src/platform/store/sealed"]),
    ("fuser", &["src/fs/fuse.rs"]),
    ("kvm_ioctls", &["src/capture", "src/vmm/kvm", "src/ops/doctor"]),
    ("kvm_bindings", &["src/capture/ring.rs", "src/vmm/kvm"]),
    ("vmm_sys_util", &["src/vmm/kvm"]),
    ("zerocopy", &["src/vmm/kvm"]),
    ("libc", &["src/platform/flush.rs", "src/platform/memory.rs", "src/uffd/peer.rs"]),
];

/// Where there is unsafe code: calls of the kernel that no crate makes safe.
const WITH_UNSAFE: [&str; 11] = [
    "src/capture/memory.rs",
    "src/capture/ring.rs",
    "src/ops/doctor/virtualization.rs",
    "src/platform/flush.rs",
    "src/platform/memory.rs",
    "src/uffd/descriptor.rs",
    "src/uffd/ledger.rs",
    "src/uffd/peer.rs",
    "src/vmm/child.rs",
    "src/vmm/kvm/kick.rs",
    "src/vmm/kvm/machine.rs",
];

/// The format does no I/O, reads no clock and starts no threads.
const NOT_IN_FORMAT: [&str; 7] =
    ["std::fs", "std::net", "std::time", "std::thread", "std::process", "std::env", "std::os"];

fn root() -> PathBuf {
    env!("CARGO_MANIFEST_DIR").into()
}

/// Every Rust file below a directory, as its path from the root and its text.
fn files(directory: &str) -> Vec<(String, String)> {
    fn walk(directory: &Path, all: &mut Vec<PathBuf>) {
        let Ok(entries) = std::fs::read_dir(directory) else { return };
        for path in entries.map(|entry| entry.unwrap().path()) {
            if path.is_dir() {
                walk(&path, all);
            } else if path.extension().is_some_and(|extension| extension == "rs") {
                all.push(path);
            }
        }
    }
    let mut all = Vec::new();
    walk(&root().join(directory), &mut all);
    assert!(!all.is_empty(), "{directory} has no files");
    let name = |path: &Path| path.strip_prefix(root()).unwrap().to_str().unwrap().to_owned();
    all.iter().map(|path| (name(path), std::fs::read_to_string(path).unwrap())).collect()
}

/// The code without comments, so that a sentence may speak of what the code must not use.
fn code(text: &str) -> String {
    text.lines().map(|line| line.split("//").next().unwrap_or_default()).collect::<Vec<_>>().join("\n")
}

/// Whether the text has this word, alone.
fn has_word(text: &str, word: &str) -> bool {
    let is_part = |letter: char| letter.is_alphanumeric() || letter == '_';
    text.match_indices(word)
        .any(|(at, _)| !text[..at].ends_with(is_part) && !text[at + word.len()..].starts_with(is_part))
}

/// The modules of this crate that a file names: `crate::a::...`, and each name in `crate::{a, b::c}`.
fn modules_used(text: &str) -> Vec<String> {
    let name =
        |text: &str| text.split(|letter: char| !letter.is_alphanumeric() && letter != '_').next().unwrap().to_owned();
    let mut used = Vec::new();
    for (at, word) in text.match_indices("crate::") {
        if text[..at].ends_with('$') {
            continue;
        }
        let rest = &text[at + word.len()..];
        match rest.strip_prefix('{') {
            None => used.push(name(rest)),
            Some(list) => {
                let mut depth = 0;
                for part in list.split_inclusive([',', '{', '}']) {
                    if depth == 0 {
                        used.push(name(part.trim()));
                    }
                    match part.chars().last() {
                        Some('{') => depth += 1,
                        Some('}') if depth == 0 => break,
                        Some('}') => depth -= 1,
                        _ => {}
                    }
                }
            }
        }
    }
    used.retain(|name| !name.is_empty());
    used
}

fn layer(module: &str) -> Option<u32> {
    LAYERS.iter().find(|(name, _)| *name == module).map(|(_, layer)| *layer)
}

/// The module of the crate that a file belongs to.
fn module_of(file: &str) -> String {
    let below = file.strip_prefix("src/").unwrap();
    below.split('/').next().unwrap().trim_end_matches(".rs").to_owned()
}

#[test]
fn a_module_uses_only_lower_layers() {
    let mut wrong = Vec::new();
    for (file, text) in files("src") {
        let module = module_of(&file);
        if TOP.contains(&module.as_str()) {
            continue;
        }
        let Some(own) = layer(&module) else {
            wrong.push(format!("{file}: the module {module} has no layer: give it one in this test"));
            continue;
        };
        for used in modules_used(&code(&text)) {
            // Types that the crate's root hands on are the error's.
            let is_type = used.starts_with(char::is_uppercase);
            if used == module || is_type || layer(&used).is_some_and(|used| used < own) {
                continue;
            }
            wrong.push(format!("{file} uses {used}, which is not below {module}"));
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn foreign_crates_stay_where_they_belong() {
    let mut wrong = Vec::new();
    for (file, text) in files("src").into_iter().chain(files("storage-format/src")) {
        let code = code(&text);
        for (name, places) in CONFINED {
            let belongs = places.iter().any(|place| file == *place || file.starts_with(&format!("{place}/")));
            if !belongs
                && has_word(&code, name)
                && (code.contains(&format!("{name}::")) || code.contains(&format!("use {name}")))
            {
                wrong.push(format!("{file} uses {name}, which belongs in {}", places.join(", ")));
            }
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn the_format_is_pure() {
    let mut wrong = Vec::new();
    for (file, text) in files("storage-format/src") {
        for name in NOT_IN_FORMAT {
            if has_word(&code(&text), name) {
                wrong.push(format!("{file} uses {name}"));
            }
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn unsafe_code_is_where_it_is_said_to_be() {
    let wrong: Vec<String> = files("src")
        .into_iter()
        .filter(|(file, text)| has_word(&code(text), "unsafe") && !WITH_UNSAFE.contains(&file.as_str()))
        .map(|(file, _)| format!("{file} has unsafe code; what needs it belongs in {}", WITH_UNSAFE.join(", ")))
        .collect();
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn files_are_short_enough_to_read() {
    let all = ["src", "storage-format/src", "tests"].into_iter().flat_map(files);
    let long: Vec<String> = all
        .map(|(file, text)| (text.lines().count(), file))
        .filter(|(lines, _)| *lines > LINES_MAX)
        .map(|(lines, file)| format!("{file} has {lines} lines: split it by what its parts are about"))
        .collect();
    assert!(long.is_empty(), "{}", long.join("\n"));
}

/// The checks above must notice what they are there for.
#[test]
fn the_rules_are_noticed_when_broken() {
    assert_eq!(modules_used("use crate::cli::output;\nlet x = crate::repo::Index::none();"), ["cli", "repo"]);
    assert_eq!(modules_used("use crate::{error::{Error, Kind}, ops, Result};"), ["error", "ops", "Result"]);
    assert_eq!(code("let a = 1; // crate::cli\n//! crate::cli"), "let a = 1; \n");
    assert!(has_word("use rocksdb::DB;", "rocksdb") && !has_word("use my_rocksdb::DB;", "rocksdb"));
    assert!(layer("platform") < layer("repo") && layer("repo") < layer("epoch") && layer("vmm") < layer("ops"));
    assert_eq!(module_of("src/error.rs"), "error");
    assert_eq!(module_of("src/repo/index/mod.rs"), "repo");
}
