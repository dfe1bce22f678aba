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

// TestDocsNameTestsThatExist: what the documents give as evidence is there. A name that ends in * stands for all that begin so.
func TestDocsNameTestsThatExist(t *testing.T) {
	exist := map[string]bool{}
	for _, s := range sources(t) {
		for _, d := range s.ast.Decls {
			if f, ok := d.(*ast.FuncDecl); ok && f.Recv == nil {
				exist[f.Name.Name] = true
			}
		}
	}
	begins := func(prefix string) bool {
		for name := range exist {
			if strings.HasPrefix(name, prefix) {
				return true
			}
		}
		return false
	}
	mention := regexp.MustCompile(`\b(?:Test|Fuzz|Benchmark)[A-Z]\w*\*?`)
	named := 0
	for _, path := range documents(t) {
		text, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		for _, name := range mention.FindAllString(string(text), -1) {
			named++
			if prefix, all := strings.CutSuffix(name, "*"); all && begins(prefix) || exist[name] {
				continue
			}
			t.Errorf("%s names %s, which does not exist", path, name)
		}
	}
	if named == 0 {
		t.Error("no document names a test: this test shows nothing")
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
