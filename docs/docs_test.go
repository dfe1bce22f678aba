// Package docs_test sees to it that the documents speak of what is there.
package docs_test

import (
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
)

const root = ".."

var (
	code     = regexp.MustCompile("`([^`\n]+)`")
	testName = regexp.MustCompile(`^(Test|Fuzz|Benchmark)[A-Z]\w+$`)
	fileName = regexp.MustCompile(`^[\w./-]+/[\w.-]+\.(go|md|sh|json|service)$`)
	link     = regexp.MustCompile(`\]\(([^)#:]+)\)`)
	function = regexp.MustCompile(`(?m)^func ((?:Test|Fuzz|Benchmark)\w+)\(`)
)

// documents are all Markdown files of the project.
func documents(t *testing.T) []string {
	t.Helper()
	top, err := filepath.Glob(filepath.Join(root, "*.md"))
	if err != nil {
		t.Fatal(err)
	}
	return append(top, walk(t, filepath.Join(root, "docs"), ".md")...)
}

func walk(t *testing.T, dir, ext string) (all []string) {
	t.Helper()
	err := filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		switch {
		case err != nil:
			return err
		case d.IsDir() && path != dir && strings.HasPrefix(d.Name(), "."):
			return fs.SkipDir
		case !d.IsDir() && strings.HasSuffix(path, ext):
			all = append(all, path)
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return all
}

func read(t *testing.T, path string) string {
	t.Helper()
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

// TestDocumentsNameWhatIsThere looks up every file, test and link that a document names.
func TestDocumentsNameWhatIsThere(t *testing.T) {
	tests := map[string]bool{}
	for _, path := range walk(t, root, "_test.go") {
		for _, m := range function.FindAllStringSubmatch(read(t, path), -1) {
			tests[m[1]] = true
		}
	}
	found := 0
	for _, doc := range documents(t) {
		text := read(t, doc)
		for _, m := range code.FindAllStringSubmatch(text, -1) {
			name := m[1]
			switch {
			case testName.MatchString(name):
				found++
				if !tests[name] {
					t.Errorf("%s: there is no %s", doc, name)
				}
			case fileName.MatchString(name) && !filepath.IsAbs(name):
				found++
				if _, err := os.Stat(filepath.Join(root, name)); err != nil {
					t.Errorf("%s: %v", doc, err)
				}
			}
		}
		for _, m := range link.FindAllStringSubmatch(text, -1) {
			if _, err := os.Stat(filepath.Join(filepath.Dir(doc), m[1])); err != nil {
				t.Errorf("%s: %v", doc, err)
			}
		}
	}
	if found < 100 {
		t.Errorf("%d names found in the documents: this test has stopped looking", found)
	}
}
