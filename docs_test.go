package vhostd_test

import (
	"go/ast"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
)

// What a document can name: a test, of which a name that ends in * stands for all that begin so; a file, by its path from the top and as
// code; another document, as a link.
var (
	mentionedTest = regexp.MustCompile(`\b(?:Test|Fuzz|Benchmark)[A-Z]\w*\*?`)
	mentionedFile = regexp.MustCompile("`([\\w.-][\\w./-]*/[\\w.-]+\\.(?:go|md|sh|json|service))`")
	mentionedLink = regexp.MustCompile(`\]\(([^)#:]+)\)`)
)

// TestDocumentsNameWhatIsThere looks up every test, file and link that a document names.
func TestDocumentsNameWhatIsThere(t *testing.T) {
	exists := tests(t)
	named := 0
	for _, path := range documents(t) {
		b, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		text := string(b)
		for _, name := range mentionedTest.FindAllString(text, -1) {
			if named++; !exists(name) {
				t.Errorf("%s names %s, which does not exist", path, name)
			}
		}
		var files []string
		for _, m := range mentionedFile.FindAllStringSubmatch(text, -1) {
			files = append(files, m[1])
		}
		for _, m := range mentionedLink.FindAllStringSubmatch(text, -1) {
			files = append(files, filepath.Join(filepath.Dir(path), m[1]))
		}
		for _, file := range files {
			named++
			if _, err := os.Stat(file); err != nil {
				t.Errorf("%s: %v", path, err)
			}
		}
	}
	if named < 100 {
		t.Errorf("%d names found in the documents: this test has stopped looking", named)
	}
}

// tests returns what tells whether a test exists, or one that begins so.
func tests(t *testing.T) func(name string) bool {
	t.Helper()
	exist := map[string]bool{}
	for _, s := range sources(t) {
		for _, d := range s.ast.Decls {
			if f, ok := d.(*ast.FuncDecl); ok && s.test() && f.Recv == nil {
				exist[f.Name.Name] = true
			}
		}
	}
	return func(name string) bool {
		prefix, all := strings.CutSuffix(name, "*")
		if !all {
			return exist[name]
		}
		for name := range exist {
			if strings.HasPrefix(name, prefix) {
				return true
			}
		}
		return false
	}
}

// documents lists the Markdown files of the tree.
func documents(t *testing.T) (paths []string) {
	t.Helper()
	err := filepath.WalkDir(".", func(path string, d fs.DirEntry, err error) error {
		switch {
		case err != nil:
			return err
		case d.IsDir() && path != "." && strings.HasPrefix(d.Name(), "."):
			return fs.SkipDir
		case strings.HasSuffix(path, ".md"):
			paths = append(paths, path)
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return paths
}
