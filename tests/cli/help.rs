//! Help, usage errors, and what the program does with its output.

use std::io::Read;
use std::process::Stdio;

use clap::Command;

use crate::support::{World, finish, run};

/// Every command that there is, as the words that name it.
fn commands() -> Vec<(Vec<String>, Command)> {
    fn below(command: &Command, words: &[String], all: &mut Vec<(Vec<String>, Command)>) {
        for command in command.get_subcommands().filter(|command| command.get_name() != "help") {
            let mut words = words.to_vec();
            words.push(command.get_name().to_owned());
            below(command, &words, all);
            all.push((words, command.clone()));
        }
    }
    let mut all = vec![(Vec::new(), epochfs::cli::command())];
    below(&epochfs::cli::command(), &[], &mut all);
    all
}

/// The words of an example, up to where the shell takes over or a remark begins.
fn example_words(line: &str) -> Vec<String> {
    let line = line.split([';', '|', '>']).next().unwrap_or_default().split(" (").next().unwrap_or_default();
    line.split_whitespace().map(|word| word.trim_matches(['\'', '"']).to_owned()).collect()
}

#[test]
fn the_help_of_every_command_has_examples_that_parse() {
    let world = World::empty();
    for (words, _) in commands() {
        let ran = world.ok(words.iter().map(String::as_str).chain(["--help"]));
        assert!(ran.stdout.contains("Usage: epochfs"), "{words:?}: {}", ran.stdout);
        let (_, examples) = ran.stdout.split_once("Example").unwrap_or_else(|| panic!("{words:?} has no example"));
        let own = std::iter::once("epochfs").chain(words.iter().map(String::as_str)).collect::<Vec<_>>().join(" ");
        let lines: Vec<&str> = examples.lines().map(str::trim).filter(|line| line.starts_with("epochfs ")).collect();
        assert!(!lines.is_empty(), "{words:?} has no example that begins with epochfs");
        for line in lines {
            let matches = epochfs::cli::command().try_get_matches_from(example_words(line));
            assert!(matches.is_ok(), "{own}: the example {line:?} does not parse: {}", matches.unwrap_err());
        }
        let short = world.ok(words.iter().map(String::as_str).chain(["-h"]));
        assert!(short.stdout.contains("Example"), "{words:?} -h");
    }
}

#[test]
fn a_wrong_command_line_is_a_usage_error() {
    let world = World::new();
    let wrong: [&[&str]; 9] = [
        &[],
        &["no-such-command"],
        &["ls", "--no-such-option"],
        &["log"],
        &["export", "web1"],
        &["log", "web1", "--last", "many"],
        &["commit", "web1", "memory=/dev/null", "--compression", "20"],
        &["completions", "no-such-shell"],
        &["tag", "web1", "a", "--force", "--delete"],
    ];
    for arguments in wrong {
        let ran = world.run(arguments);
        ran.code(2);
        assert!(ran.stdout.is_empty() && !ran.stderr.is_empty(), "{arguments:?}: {ran:?}");
    }
    world.ok(["--version"]);
}

#[test]
fn arguments_that_are_not_text_are_usage_errors() {
    use std::ffi::OsStr;
    use std::os::unix::ffi::OsStrExt;
    let world = World::new();
    let bytes = OsStr::from_bytes(b"we\xffb");
    for command in ["log", "ls", "show", "stats", "rm"] {
        world.run([OsStr::new(command), bytes]).code(2);
    }
}

#[test]
fn a_reader_that_goes_away_is_no_error() {
    let world = World::new();
    let file = world.file("a", [1; 100]);
    for _ in 0..3 {
        world.commit("web1", &file);
    }
    for arguments in [&["log", "web1"][..], &["ls", "--json"], &["--help"], &["completions", "bash"], &["man"]] {
        let mut child = world.start(arguments);
        drop(child.stdout.take());
        let ran = finish(child);
        ran.code(0);
        assert!(ran.stderr.is_empty(), "{arguments:?}: {ran:?}");
    }
    // With a reader that takes one line, like head.
    let mut child = world.start(["completions", "bash"]);
    let mut reader = child.stdout.take().unwrap();
    reader.read_exact(&mut [0; 10]).unwrap();
    drop(reader);
    assert!(finish(child).code(0).stderr.is_empty());
}

#[test]
fn output_that_cannot_be_written_is_an_error() {
    let world = World::new();
    let full = std::fs::OpenOptions::new().write(true).open("/dev/full").unwrap();
    let mut command = world.command(["ls"]);
    command.stdout(Stdio::from(full));
    run(command).code(1).says("standard output");
}
