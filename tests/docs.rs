//! What the documents say of the code is so: drop reasons, places in the source, commands, paths and links; and what the
//! packages are made of is there.
//!
//! `LINECARD_REWRITE=1 cargo test --test docs` writes docs/drop-reasons.md anew.

#![allow(clippy::unwrap_used)]

use std::collections::HashSet;
use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};

use clap::{CommandFactory as _, Parser as _};
use linecard::cli::{DaemonOptions, Options};
use linecard::verdict::DropReason;

fn at(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(path)
}

fn read(path: &str) -> String {
    fs::read_to_string(at(path)).unwrap_or_else(|error| panic!("{path}: {error}"))
}

/// Fails with everything that is wrong, one per line.
fn expect_none(wrong: &[String], what: &str) {
    assert!(wrong.is_empty(), "{what}:\n  {}", wrong.join("\n  "));
}

fn drop_reasons() -> String {
    let mut page = String::from(
        "# Drop reasons

Every frame that a port receives is delivered, or dropped and counted there under one of these reasons: received = delivered +
dropped. `linecard drops` shows the reasons that have counted, `linecard port show` those of one port, `/metrics` all of them.

This page is made from `DropReason` in `src/verdict.rs`: change it there, then run `LINECARD_REWRITE=1 cargo test --test docs`.

| reason | means | what to do |
|---|---|---|
",
    );
    for reason in DropReason::ALL {
        writeln!(page, "| `{}` | {} | {} |", reason.name(), reason.meaning(), reason.advice()).unwrap();
    }
    page
}

#[test]
fn the_page_of_drop_reasons_is_made_from_the_enum() {
    let (page, path) = (drop_reasons(), "docs/drop-reasons.md");
    if std::env::var_os("LINECARD_REWRITE").is_some() {
        fs::write(at(path), &page).unwrap();
    }
    assert_eq!(page.matches('|').count(), 4 * (DropReason::COUNT + 2), "a sentence with a bar in it breaks the table");
    assert_eq!(read(path), page, "{path} is not what DropReason says: LINECARD_REWRITE=1 cargo test --test docs");
}

/// `text` between the heading `## name` and the next one.
fn section(text: &str, name: &str) -> String {
    let start = text.find(&format!("\n## {name}\n")).unwrap_or_else(|| panic!("no section {name}")) + 1;
    let rest = &text[start..];
    rest[..rest[1..].find("\n## ").map_or(rest.len(), |end| end + 1)].into()
}

/// Everything in backticks, across line ends.
fn code_spans(text: &str) -> Vec<String> {
    text.split('`').skip(1).step_by(2).map(|span| span.split_whitespace().collect::<Vec<_>>().join(" ")).collect()
}

/// The text of `path` in `src/`: a file or folder (`shard/wake.rs`, `switch/fdb`), or a file by its name alone.
fn source(path: &str) -> Option<String> {
    fn gather(below: &Path, name: Option<&str>, text: &mut String) {
        if below.is_dir() {
            fs::read_dir(below).unwrap().for_each(|entry| gather(&entry.unwrap().path(), name, text));
        } else if below.exists() && name.is_none_or(|name| below.ends_with(name)) {
            text.push_str(&fs::read_to_string(below).unwrap());
        }
    }
    let mut text = String::new();
    match path.contains('/') {
        true => gather(&at("src").join(path), None, &mut text),
        false => gather(&at("src"), Some(path), &mut text),
    }
    (!text.is_empty()).then_some(text)
}

/// Whether `text` has function `name`, written as `Type::function` or `function`.
fn defines(text: &str, name: &str) -> bool {
    let (owner, function) = name.rsplit_once("::").map_or((None, name), |(owner, function)| (Some(owner), function));
    let function = [format!("fn {function}("), format!("fn {function}<")].iter().any(|head| text.contains(head));
    let owner = owner.is_none_or(|owner| {
        text.lines()
            .any(|line| line.starts_with("impl") && line.split(|c: char| !c.is_alphanumeric()).any(|w| w == owner))
    });
    function && owner
}

#[test]
fn a_frames_way_names_files_and_functions_that_there_are() {
    let (mut named, mut wrong) = (0, Vec::new());
    for span in code_spans(&section(&read("ARCHITECTURE.md"), "A frame's way")) {
        let (file, function) = match span.split_once(": ") {
            Some((file, function)) => (file, Some(function)),
            None if span.contains('/') || span.ends_with(".rs") => (span.as_str(), None),
            None => continue,
        };
        named += 1;
        match source(file) {
            None => wrong.push(format!("`{span}`: there is no src/{file}")),
            Some(text) => {
                let missing = function.filter(|function| !defines(&text, function));
                wrong.extend(missing.map(|function| format!("`{span}`: {file} has no {function}")));
            }
        }
    }
    expect_none(&wrong, "ARCHITECTURE.md, \"A frame's way\"");
    assert!(named >= 8, "the places were not found");
}

/// The lines of a document's code blocks, without comments and spaces at their ends.
fn code_lines(text: &str) -> Vec<String> {
    let mut inside = false;
    let mut lines = Vec::new();
    for line in text.lines() {
        if line.starts_with("```") {
            inside = !inside;
        } else if inside {
            lines.push(line.split(" #").next().unwrap_or("").trim().into());
        }
    }
    lines
}

#[test]
fn commands_of_the_documents_can_be_typed() {
    let (mut typed, mut wrong) = (0, Vec::new());
    for document in documents() {
        for line in code_lines(&read(&document)) {
            let words: Vec<&str> = line.split_whitespace().collect();
            let parsed = match words.first() {
                Some(&"linecard") => Options::try_parse_from(&words).map(drop),
                Some(&"linecardd") => DaemonOptions::try_parse_from(&words).map(drop),
                _ => continue,
            };
            typed += 1;
            // Asking for help ends the parsing, but is no mistake.
            if let Err(error) = parsed.map_err(|error| error.to_string())
                && !error.starts_with("Usage")
                && !words.contains(&"--help")
            {
                wrong.push(format!("{document}: `{line}`: {}", error.lines().next().unwrap_or("")));
            }
        }
        for target in read(&document).split("`make ").skip(1).filter_map(|rest| rest.split(['`', ' ']).next()) {
            if !read("Makefile").contains(&format!("\n{target}:")) {
                wrong.push(format!("{document}: `make {target}`: the Makefile has no such target"));
            }
        }
    }
    expect_none(&wrong, "what cannot be typed");
    assert!(typed >= 8, "the examples were not found");
}

#[test]
fn every_verb_has_a_line_of_help() {
    fn walk(command: &clap::Command, wrong: &mut Vec<String>) {
        for verb in command.get_subcommands() {
            if verb.get_about().is_none() {
                wrong.push(format!("{} {}", command.get_name(), verb.get_name()));
            }
            walk(verb, wrong);
        }
    }
    let mut wrong = Vec::new();
    walk(&Options::command(), &mut wrong);
    expect_none(&wrong, "verbs without help");
}

/// Every document of the project, by its path from the root.
fn documents() -> Vec<String> {
    let folders = ["", "docs", "fuzz", "packaging", "benches", "examples", "configs", "qemu-tests"];
    let files = folders.iter().flat_map(|folder| fs::read_dir(at(folder)).into_iter().flatten());
    let paths = files.map(|entry| entry.unwrap().path()).filter(|path| path.extension().is_some_and(|end| end == "md"));
    let root = at("");
    let mut names: Vec<String> = paths.map(|path| path.strip_prefix(&root).unwrap().to_str().unwrap().into()).collect();
    names.sort();
    assert!(names.len() >= 8, "the documents were not found");
    names
}

#[test]
fn links_lead_to_files_that_there_are() {
    let (mut followed, mut wrong) = (0, Vec::new());
    for document in documents() {
        let folder = at(&document).parent().unwrap().to_owned();
        let text = read(&document);
        for link in text.split("](").skip(1).filter_map(|rest| rest.split([')', '#']).next()) {
            if !link.is_empty() && !link.contains("://") {
                followed += 1;
                wrong.extend((!folder.join(link).exists()).then(|| format!("{document}: {link}")));
            }
        }
    }
    expect_none(&wrong, "links to nowhere");
    assert!(followed >= 8, "the links were not found");
}

/// What was pasted twice is noticed by nobody else: a table goes on looking like one.
#[test]
fn no_long_line_stands_twice_in_a_document() {
    let twice = documents().into_iter().flat_map(|document| {
        let mut seen = HashSet::new();
        let text = read(&document);
        let again = text.lines().filter(|line| line.len() > 80 && !seen.insert(line.to_string()));
        again.map(|line| format!("{document}: {line}")).collect::<Vec<_>>()
    });
    expect_none(&twice.collect::<Vec<_>>(), "lines that stand twice in one document");
}

#[test]
fn paths_of_the_readme_exist() {
    let text = read("README.md");
    let words = text.split(|c: char| c.is_whitespace() || "`()[],;".contains(c));
    let places = ["benches/", "configs/", "docs/", "examples/", "fuzz/", "packaging/", "qemu-tests/", "src/", "tests/"];
    let named: Vec<&str> = words.filter(|word| places.iter().any(|place| word.starts_with(place))).collect();
    let wrong: Vec<String> = named.iter().filter(|path| !at(path).exists()).map(|path| path.to_string()).collect();
    expect_none(&wrong, "paths in README.md that lead nowhere");
    assert!(named.len() >= 4, "the paths were not found");
}

/// Sources of assets, scripts and units. What packaging/build.sh makes is in target/ and not looked for.
#[test]
fn packages_are_made_of_files_that_there_are() {
    let manifest = read("Cargo.toml");
    let metadata = manifest.split("[package.metadata.").skip(1).map(|table| table.split("\n[").next().unwrap());
    let quoted: Vec<&str> = metadata.flat_map(|table| table.split('"').skip(1).step_by(2)).collect();
    let places = ["packaging/", "configs/", "docs/", "README", "CHANGELOG", "LICENSE"];
    let sources: Vec<&&str> = quoted.iter().filter(|text| places.iter().any(|place| text.starts_with(place))).collect();
    let wrong = sources.iter().filter(|source| match source.split_once('*') {
        None => !at(source).exists(),
        Some((before, after)) => {
            let folder = at(before.rsplit_once('/').map_or("", |(folder, _)| folder));
            let mut names =
                fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap());
            let begin = before.rsplit('/').next().unwrap();
            !names.any(|name| name.starts_with(begin) && name.ends_with(after))
        }
    });
    let wrong: Vec<String> = wrong.map(|source| source.to_string()).collect();
    expect_none(&wrong, "Cargo.toml packages what is not there");
    assert!(sources.len() >= 16, "the metadata was not found");

    let unit = read("packaging/systemd/linecardd.service");
    let starts = unit.lines().find_map(|line| line.strip_prefix("ExecStart=")).unwrap();
    let words: Vec<&str> = starts.split(' ').collect();
    let options = DaemonOptions::try_parse_from(&words).unwrap();
    assert!(quoted.contains(&words[0]), "no package installs {}", words[0]);
    assert!(quoted.iter().any(|text| options.config == Path::new(text)), "no package installs {starts}");
}
