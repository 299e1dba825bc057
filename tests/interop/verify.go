// Verifies a log that the gateway laid out as C2SP tiles, with the Go team's note and tlog packages alone.
//
//	go run verify.go <folder of tiles> <vkey> <index> <leaf as a file>
package main

import (
	"fmt"
	"os"
	"path/filepath"
	"strconv"

	"golang.org/x/mod/sumdb/note"
	"golang.org/x/mod/sumdb/tlog"
)

func check(err error) {
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

type tiles struct{ dir string }

func (t tiles) Height() int                        { return 8 }
func (t tiles) SaveTiles([]tlog.Tile, [][]byte)    {}
func (t tiles) ReadTiles(ts []tlog.Tile) ([][]byte, error) {
	var all [][]byte
	for _, tile := range ts {
		// x/mod writes tile/8/<level>/...; C2SP tile/<level>/...
		path := filepath.Join(t.dir, "tile", tile.Path()[len("tile/8/"):])
		data, err := os.ReadFile(path)
		if err != nil {
			return nil, err
		}
		all = append(all, data)
	}
	return all, nil
}

func main() {
	text, err := os.ReadFile(filepath.Join(os.Args[1], "checkpoint"))
	check(err)
	verifier, err := note.NewVerifier(os.Args[2])
	check(err)
	opened, err := note.Open(text, note.VerifierList(verifier))
	check(err)
	tree, err := tlog.ParseTree([]byte("go.sum database tree\n" + opened.Text[len(verifier.Name())+1:]))
	check(err)
	index, err := strconv.ParseInt(os.Args[3], 10, 64)
	check(err)
	leaf, err := os.ReadFile(os.Args[4])
	check(err)
	reader := tlog.TileHashReader(tree, tiles{os.Args[1]})
	proof, err := tlog.ProveRecord(tree.N, index, reader)
	check(err)
	check(tlog.CheckRecord(proof, tree.N, tree.Hash, index, tlog.RecordHash(leaf)))
	for old := int64(1); old < tree.N; old += 97 {
		hash, err := tlog.TreeHash(old, reader)
		check(err)
		proof, err := tlog.ProveTree(tree.N, old, reader)
		check(err)
		check(tlog.CheckTree(proof, tree.N, tree.Hash, old, hash))
	}
	fmt.Println("verified", tree.N)
}
